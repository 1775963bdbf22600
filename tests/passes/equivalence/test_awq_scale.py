"""AWQ's scales with a given ratio."""

import pytest

from fxopt.errors import RecipeError
from fxopt.passes.equivalence.awq_scale import AwqScale
from tests.passes.equivalence.harness import canonical, refusals, run, sites


@pytest.mark.parametrize(("model", "count"), [("llama", 9), ("gptneox", 7), ("bert", 2)])
def test_scales_that_fold_are_folded(model, count):
    after = run(canonical(model), AwqScale())
    assert len(sites(after)) == count


def test_what_does_not_fold_is_refused():
    after = run(canonical("bert"), AwqScale())
    assert "what it reads comes out of aten." in refusals(after)


def test_a_ratio_of_zero_does_nothing():
    assert not sites(run(canonical("llama"), AwqScale(ratio=0.0)))


def test_a_ratio_outside_its_range_is_refused():
    with pytest.raises(RecipeError, match="between 0 and 1"):
        AwqScale(ratio=2.0)
