"""Every number that a check compares against, in one place."""

import torch

# Error over rms of the output, in float64, that an EQUIVALENT pass may leave behind: rounding.
EQUIVALENT_FLOAT64 = 1e-9

# An output that is zero over the reals (the mean of what was centred) is rounding and nothing else,
# and so is any difference. What the model rounds there in its own dtype, in units of that dtype,
# says how large it is; so much more is allowed, for the luck of a sample.
ROUNDING_SLACK = 64.0

# A pass that edits weights is repeated in float64 to be judged. So many bytes of what it writes
# are held in memory; what goes beyond lies in temporary files while the pass is judged.
EDITS_IN_MEMORY = 500_000_000

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

# A kernel against its reference on the same operands. Inside a kernel that quantizes between two
# products, a value may fall to the other side of a step.
KERNEL_SQNR_DB = {
    torch.float64: 60.0,
    torch.float32: 40.0,
    torch.bfloat16: 35.0,
    torch.float16: 38.0,
}

# A whole lowered program against its graph: this, or what quantization was measured to cost less
# a slack (two samples of the same noise differ by 3 dB more than one of them).
LOWERED_SQNR_DB = 35.0
LOWERED_SLACK_DB = 6.0
