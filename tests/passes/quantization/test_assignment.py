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


def problem(seed: int, sites: int, choices: int, spread: float = 4, dearest: int = 10_000):
    """More of the price never loses more, as with bits; sizes and units differ widely."""
    generator = np.random.default_rng(seed)
    price = np.sort(generator.integers(1, dearest, (sites, choices)), axis=1).astype(float)
    loss = -np.sort(-generator.lognormal(-8, spread, (sites, choices)), axis=1)
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
@given(
    seed=seeds,
    sites=st.integers(1, 80),
    share=st.floats(0, 1),
    spread=st.sampled_from([1, 4, 8]),
    dearest=st.sampled_from([10_000, 10_000_000]),
)
def test_it_is_never_worse_than_greedy(seed, sites, share, spread, dearest):
    loss, price = problem(seed, sites, 4, spread, dearest)
    limit = price.min(1).sum() + share * np.ptp(price, 1).sum()
    chosen = assign(loss, price, limit)
    assert total(price, chosen) <= limit
    best = total(loss, greedy(loss, price, limit))
    assert total(loss, chosen) <= best * (1 + 1e-9)


@pytest.mark.parametrize("below", [0, 1, 5, 1e6])
def test_a_byte_too_little_costs_one_site(below):
    """The solver takes a little more than the limit for the limit."""
    price = np.tile([5e6, 1e7], (5, 1))
    loss = np.tile([1.0, 0.0], (5, 1)) * np.arange(1, 6)[:, None]
    chosen = assign(loss, price, 4e7 - below)
    assert chosen.sum() == (3 if below == 0 else 2)
    assert total(price, chosen) <= 4e7 - below


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


def test_where_the_solver_finds_nothing_within_the_limit_single_steps_do(monkeypatch):
    price = np.array([[1.0, 2.0], [3.0, 5.0]])
    solver_that_says(monkeypatch, 2, "The problem is infeasible.")
    loss = np.array([[2.0, 1.0], [2.0, 1.0]])
    assert assign(loss, price, 4).tolist() == [0, 0]
    assert assign(loss, price, 5).tolist() == [1, 0]
    assert assign(loss, price, 7).tolist() == [1, 1]


@pytest.mark.parametrize("status", [1, 3, 4])
def test_a_solver_that_gives_up_is_told(monkeypatch, status):
    price = np.array([[1.0, 2.0], [3.0, 5.0]])
    solver_that_says(monkeypatch, status, "Time limit reached.")
    with pytest.raises(PassError, match=r"2 sites of 2 choices .* Time limit reached"):
        assign(np.array([[2.0, 1.0], [2.0, 1.0]]), price, 7)
