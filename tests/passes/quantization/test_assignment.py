"""The integer program: it meets its limit, and no other assignment within it loses less."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import PassError
from fxopt.passes.quantization import assignment
from fxopt.passes.quantization.assignment import assign, total

seeds = st.integers(0, 100_000)


def problem(seed: int, sites: int, choices: int):
    """More of the price never loses more, as with bits; sizes and units differ widely."""
    generator = np.random.default_rng(seed)
    price = np.sort(generator.integers(1, 10_000, (sites, choices)), axis=1).astype(float)
    loss = -np.sort(-generator.lognormal(-8, 4, (sites, choices)), axis=1)
    return loss, price


def greedy(loss, price, limit: float):
    """Spend on the step that gains most for its price until none fits."""
    chosen = price.argmin(1)
    while True:
        steps = [
            ((loss[i, chosen[i]] - loss[i, c]) / max(price[i, c] - price[i, chosen[i]], 1e-9), i, c)
            for i in range(len(loss))
            for c in range(loss.shape[1])
            if loss[i, c] < loss[i, chosen[i]]
            and total(price, chosen) + price[i, c] - price[i, chosen[i]] <= limit
        ]
        if not steps:
            return chosen
        _, site, choice = max(steps)
        chosen[site] = choice


@settings(max_examples=40, deadline=None)
@given(seed=seeds, sites=st.integers(1, 6), choices=st.integers(2, 3), share=st.floats(0, 1))
def test_it_is_the_best_of_all_assignments_and_meets_its_limit(seed, sites, choices, share):
    loss, price = problem(seed, sites, choices)
    cheapest, dearest = price.min(1).sum(), price.max(1).sum()
    limit = cheapest + share * (dearest - cheapest)
    chosen = assign(loss, price, limit)
    assert total(price, chosen) <= limit * (1 + 1e-9)
    within = [
        total(loss, np.array(other))
        for other in itertools.product(range(choices), repeat=sites)
        if total(price, np.array(other)) <= limit
    ]
    scale = np.ptp(loss, 1).max()
    assert total(loss, chosen) <= min(within) + 1e-6 * scale


@settings(max_examples=30, deadline=None)
@given(seed=seeds, sites=st.integers(1, 80), share=st.floats(0, 1))
def test_it_is_never_worse_than_greedy(seed, sites, share):
    loss, price = problem(seed, sites, 4)
    limit = price.min(1).sum() + share * np.ptp(price, 1).sum()
    chosen = assign(loss, price, limit)
    assert total(price, chosen) <= limit * (1 + 1e-9)
    scale = np.ptp(loss, 1).max()
    # The solver stops within 1e-4 of what it can prove.
    best = total(loss, greedy(loss, price, limit))
    assert total(loss, chosen) <= best + 1e-4 * max(best, scale)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, sites=st.integers(1, 30), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_limit_never_loses_more(seed, sites, shares):
    loss, price = problem(seed, sites, 3)
    limits = [price.min(1).sum() + share * np.ptp(price, 1).sum() for share in sorted(shares)]
    small, large = (total(loss, assign(loss, price, limit)) for limit in limits)
    assert large <= small + 1e-4 * max(small, np.ptp(loss, 1).max())


def test_below_the_cheapest_there_is_nothing_and_equal_losses_take_the_cheapest():
    price = np.array([[1.0, 2.0], [3.0, 5.0]])
    assert assign(np.ones((2, 2)), price, 3.9) is None
    assert assign(np.array([[2.0, 1.0], [2.0, 1.0]]), price, 4).tolist() == [0, 0]
    assert assign(np.array([[2.0, 1.0], [2.0, 1.0]]), price, 7).tolist() == [1, 1]


def solver_that_says(monkeypatch, status: int, message: str) -> None:
    answer = SimpleNamespace(status=status, message=message, x=None)
    monkeypatch.setattr(assignment, "milp", lambda *_, **__: answer)


def test_only_an_infeasible_program_takes_the_cheapest(monkeypatch):
    price = np.array([[1.0, 2.0], [3.0, 5.0]])
    solver_that_says(monkeypatch, 2, "The problem is infeasible.")
    assert assign(np.array([[2.0, 1.0], [2.0, 1.0]]), price, 7).tolist() == [0, 0]


@pytest.mark.parametrize("status", [1, 3, 4])
def test_a_solver_that_gives_up_is_told(monkeypatch, status):
    price = np.array([[1.0, 2.0], [3.0, 5.0]])
    solver_that_says(monkeypatch, status, "Time limit reached.")
    with pytest.raises(PassError, match=r"2 sites of 2 choices .* Time limit reached"):
        assign(np.array([[2.0, 1.0], [2.0, 1.0]]), price, 7)
