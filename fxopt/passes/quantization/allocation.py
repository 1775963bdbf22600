"""Search for the assignment that a budget asks for, and the frontier on the way."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxopt.passes.quantization.assignment import Matrix, assign, total
from fxopt.passes.quantization.budget import Budget
from fxopt.passes.quantization.rounding_trials import Trials

# Points of the frontier beside the one that is chosen; bisections under an accuracy budget.
_POINTS, _HALVINGS = 5, 7


@dataclass(frozen=True)
class Assignment:
    """A choice for each group: its price, and its error predicted and measured."""

    choices: NDArray[np.intp]
    price: float
    predicted: float
    measured: float
    figure: float  # the error in the words of the budget


class Search:
    """Solves and measures assignments; remembers all it has tried."""

    def __init__(
        self,
        loss: Matrix,
        price: Matrix,
        trials: Trials,
        budget: Budget,
        progress: Callable[[str], None],
    ) -> None:
        self.loss = loss
        self.price = price
        self.trials = trials
        self.budget = budget
        self.progress = progress
        self.tried: list[Assignment] = []
        self.limit = math.inf

    def best(self, limit: float) -> Assignment | None:
        """What the budget asks for, or None where no choices meet it."""
        self.limit = limit
        low, high = self.cheapest(), total(self.price, self.loss.argmin(1))
        if self.budget.judged_by_output:
            return self._cheapest_within(low, high)
        if limit < low:
            return None
        for point in np.linspace(low, max(low, high), _POINTS):
            self._try(float(point))
        return self.within(limit)

    def within(self, limit: float) -> Assignment | None:
        """The least error within a limit on the price, or None where no choices meet it."""
        return None if limit < self.cheapest() else self._try(limit)

    def cheapest(self) -> float:
        """The least price there is."""
        return float(self.price.min(1).sum())

    def counts(self, tried: Assignment) -> str:
        """How many groups take each choice: "5 int4 weight per channel, 3 floating point"."""
        numbers = np.bincount(tried.choices, minlength=self.price.shape[1])
        pairs = zip(numbers, self.trials.choices, strict=True)
        return "; ".join(f"{number} {choice.describe()}" for number, choice in pairs if number)

    def _cheapest_within(self, low: float, high: float) -> Assignment | None:
        """Bisect the limit on the price; errors grow as it falls, but for noise."""
        best = self._try(high)
        if not self._meets(best):
            return None
        first = self._try(low)
        if self._meets(first):
            return first
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = self._try(middle)
            if self._meets(found):
                high = middle
                best = min(best, found, key=lambda tried: tried.price)
            else:
                low = middle
        return best

    def _meets(self, tried: Assignment) -> bool:
        if self.budget.kind == "sqnr_db":
            return tried.figure >= self.budget.limit
        return tried.figure <= self.budget.limit

    def _try(self, limit: float) -> Assignment:
        chosen = assign(self.loss, self.price, limit)
        assert chosen is not None  # noqa: S101 - no limit below the cheapest is asked for
        for known in self.tried:
            if np.array_equal(known.choices, chosen):
                return known
        self.progress(f"assignment {len(self.tried) + 1}")
        outputs = self.trials.outputs(chosen.tolist())
        error = self.trials.error
        figures = {"kl": error.kl, "perplexity": error.perplexity_rise}
        figure = figures.get(self.budget.kind, error.sqnr_db)(outputs)
        made = Assignment(
            chosen,
            total(self.price, chosen),
            total(self.loss, chosen),
            error.cost(outputs),
            figure,
        )
        self.tried.append(made)
        return made
