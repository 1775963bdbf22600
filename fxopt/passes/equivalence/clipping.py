"""How much linears err because tokens never seen lie beyond a static range.

    error(s) = rows * sum over linears and channels of weight_j ||W_j||^2 excess_j(s)
    excess_j(s) = 2 b_j^2 / n * exp(-(u_j - a_j) / b_j)
    b_j = g a_j,    u_j = s_j max_i(a_i / s_i)

a_j is the reach of channel j over n tokens, u_j where its range ends. A new token goes beyond what
n tokens reached with probability 1/n; beyond it the tail decays exponentially by b_j, so that
excess_j is the mean square of what is cut off. g, the tail index, is one for all channels: the
median of Hill's estimator over the channels, since that of a single channel scatters too much. A
channel's weight_j is the mean weight of its largest tokens.

On the tokens that gave the range nothing is cut off. Without this term a search therefore brings
every channel to the range's end, and d channels at the end cut off d/n values of each new token.

Source: Hill, A Simple General Approach to Inference About the Tail of a Distribution, Annals of
    Statistics 3(5), 1975.
"""

import torch
from torch import Tensor

from fxopt.passes.equivalence.rounding_error import Rounding, largest

TAIL = 64  # one row in so many belongs to the tail of a channel


class Clipping:
    """The expected error of a static range on new tokens; zero for ranges chosen per token."""

    def __init__(self, rounding: Rounding) -> None:
        self.rounding = rounding
        self.sides: list[tuple[Tensor, Tensor, Tensor]] = []  # ends, decays, stakes; [d] each
        rows = rounding.rows
        count = min(-(-len(rows) // TAIL), len(rows) - 1)
        if rounding.granularity == "token" or count < 1:
            return
        values = [rows.abs()] if rounding.symmetric else [rows, -rows]
        for value, end in zip(values, rounding.ends, strict=True):
            self.sides.append(self._side(value, end[0].clamp_min(0), count))

    def _side(self, value: Tensor, end: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        top, places = value.topk(count + 1, dim=0)
        stakes = torch.zeros_like(end)
        columns = self.rounding.column_energies
        for counts, column in zip(self.rounding.token_weights, columns, strict=True):
            stakes += column * counts[places[:count]].mean(0)
        decay = tail_index(top) * end
        return end, decay, stakes * decay.square()

    def error(self, scale: Tensor) -> Tensor:
        """The error for one scale [d], in the units of `expected_error`; differentiable."""
        total = torch.zeros((), dtype=scale.dtype)
        for end, decay, stakes in self.sides:
            beyond = (largest(end[None], 1 / scale) * scale - end).clamp_min(0)
            steps = beyond / decay.clamp_min(torch.finfo(decay.dtype).tiny)
            total = total + stakes @ torch.exp(-steps)
        return total * (2 * len(self.rounding.rows) / self.rounding.tokens)


def tail_index(top: Tensor) -> Tensor:
    """Hill's mean of log(x_i / x_(k + 1)), the median over channels; `top` is [k + 1, d], sorted.

    Channels with fewer than k + 1 positive values have no tail to estimate.
    """
    tailed = top[:, top[-1] > 0]
    if not tailed.numel():
        return torch.zeros(())
    return (tailed[:-1] / tailed[-1]).log().mean(0).median()
