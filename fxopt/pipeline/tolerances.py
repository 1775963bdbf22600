"""Every number that a check compares against, in one place."""

import torch

# Error over rms of the output, in float64, that an EQUIVALENT pass may leave behind: rounding.
EQUIVALENT_FLOAT64 = 1e-9

# In the model's own dtype a rewrite reorders roundings. It may be as noisy as the original
# (measured against float64), with this much slack for the luck of one sample.
NOISE_SLACK = 4.0

# A floor under the original's noise, in rms of the output: some originals are exact by accident.
NOISE_FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 6e-2,
    torch.float16: 8e-3,
}

# Kernels against the operators they stand for. Rounding to integers turns differences in the
# last bit into whole steps at a few places, so the bar is decibels and not bits.
LOWERED_SQNR_DB = 35.0
