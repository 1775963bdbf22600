"""Which choice each site takes, so that the loss is least and the price within a limit.

    minimize sum_g loss[g, c_g]   subject to   sum_g price[g, c_g] <= limit

Shapes: loss and price [sites, choices].
Source: Yao et al., HAWQ-V3: Dyadic Neural Network Quantization, ICML 2021, arXiv:2011.10680 (bits
    by an integer program).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron

from fxopt.errors import PassError

_INFEASIBLE = 2  # scipy's status
Matrix = NDArray[np.float64]


def assign(loss: Matrix, price: Matrix, limit: float) -> NDArray[np.intp] | None:
    """The choice of each site, [sites]; None where even the cheapest choices exceed the limit.

    Raises:
        PassError: the solver gave up; what it said is in the message.
    """
    sites, choices = loss.shape
    if price.min(1).sum() > limit:
        return None
    # Both in units of their own size: prices are bytes, losses may be a millionth.
    losses = (loss - loss.min(1, keepdims=True)) / max(float(np.ptp(loss, 1).max()), 1e-300)
    unit = float(np.abs(price).max()) or 1.0
    one_each = kron(eye_array(sites), np.ones((1, choices)))
    within = csr_array(price.reshape(1, -1) / unit)
    cheapest = price.argmin(1)
    found = milp(
        losses.reshape(-1),
        integrality=np.ones(sites * choices),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(within, -np.inf, limit / unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.status == _INFEASIBLE:  # the limit is met by nothing but the cheapest, within rounding
        return _improved(cheapest, losses, price, limit)
    if found.x is None:
        raise PassError(
            f"the integer program over {sites} sites of {choices} choices was not solved: "
            f"{found.message} Ask for fewer choices, or for another budget."
        )
    # The solver takes a little more than the limit for it, and losses below a millionth of the
    # largest for none: single moves settle the rest.
    solved = _affordable(found.x.reshape(sites, choices).argmax(1), losses, price, limit)
    ends = [_improved(start, losses, price, limit) for start in (solved, cheapest)]
    return min(ends, key=lambda chosen: total(losses, chosen))


def _affordable(
    chosen: NDArray[np.intp], loss: Matrix, price: Matrix, limit: float
) -> NDArray[np.intp]:
    """The choices with single ones exchanged for cheaper ones, until the limit is met."""
    chosen = chosen.copy()
    while total(price, chosen) > limit:
        saved = np.take_along_axis(price, chosen[:, None], 1) - price
        lost = loss - np.take_along_axis(loss, chosen[:, None], 1)
        rate = np.where(saved > 0, lost / np.where(saved > 0, saved, 1.0), np.inf)
        site, choice = np.unravel_index(int(rate.argmin()), rate.shape)
        if not np.isfinite(rate[site, choice]):
            return price.argmin(1)
        chosen[site] = choice
    return chosen


def _improved(
    chosen: NDArray[np.intp], loss: Matrix, price: Matrix, limit: float
) -> NDArray[np.intp]:
    """The choices after every single exchange that lowers the loss within the limit, best first."""
    chosen = chosen.copy()
    while True:
        left = limit - total(price, chosen)
        gained = np.take_along_axis(loss, chosen[:, None], 1) - loss
        added = price - np.take_along_axis(price, chosen[:, None], 1)
        rate = np.where((gained > 0) & (added <= left), gained / np.maximum(added, 1e-300), -1.0)
        site, choice = np.unravel_index(int(rate.argmax()), rate.shape)
        if rate[site, choice] < 0:
            return chosen
        chosen[site] = choice


def total(values: Matrix, chosen: NDArray[np.intp]) -> float:
    """The sum over sites of what their choices cost."""
    return float(np.take_along_axis(values, chosen[:, None], 1).sum())
