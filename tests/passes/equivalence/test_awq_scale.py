"""AWQ's scales, with a given ratio and with the best one."""

import pytest
import torch

from fxopt.analysis.calibration import collect, linear_inputs
from fxopt.errors import RecipeError
from fxopt.passes.equivalence.awq_scale import AwqScale
from fxopt.passes.equivalence.smoothing import smoothing_sites
from fxopt.passes.quantization.grid import choose_grid
from fxopt.passes.quantization.options import WeightOptions
from tests.passes.equivalence.harness import (
    calibration_of,
    canonical,
    details,
    refusals,
    run,
    sites,
)

INT3 = WeightOptions("int3", "group", 8)


@pytest.mark.parametrize(("model", "count"), [("llama", 9), ("gptneox", 7), ("bert", 2)])
def test_scales_that_fold_are_folded(model, count):
    after = run(canonical(model), AwqScale(ratio=0.5))
    assert len(sites(after)) == count


def test_what_does_not_fold_is_refused():
    after = run(canonical("bert"), AwqScale(weights=INT3))
    assert "what it reads comes out of aten." in refusals(after)


def test_a_ratio_of_zero_does_nothing():
    assert not sites(run(canonical("llama"), AwqScale(ratio=0.0)))


def test_a_ratio_outside_its_range_is_refused():
    with pytest.raises(RecipeError, match="between 0 and 1"):
        AwqScale(ratio=2.0)


def test_groups_that_do_not_fit_are_refused():
    after = run(canonical("bert"), AwqScale())
    assert "group size 64 does not divide its 32 inputs" in refusals(after)
    assert not sites(after)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_best_ratio_never_errs_more_than_no_scale(name):
    """On the linears' own objective, for the calibration rows by which ratios are judged."""
    before = canonical(name)
    after = run(before, AwqScale(weights=INT3))
    assert sites(after)

    def errors(program):
        rows = collect(program, linear_inputs(program), calibration_of(before), rows=512)["rows"]
        found = {}
        for site in (site for site in smoothing_sites(before) if site.symmetry is not None):
            x = rows[site.reader.source.name]
            for name in site.reader.weights:
                weight = program.weight(name)
                difference = choose_grid(weight, INT3).round(weight) - weight
                found[name] = float((x @ difference.T).square().sum()), x @ weight.T
        return found

    old, new = errors(before), errors(after)
    # A weight whose own rows were scaled has outputs in other units.
    same = [
        name for name in old if torch.allclose(old[name][1], new[name][1], rtol=1e-3, atol=1e-3)
    ]
    assert same
    assert sum(new[name][0] for name in same) < 0.99 * sum(old[name][0] for name in same)


def test_a_scale_can_ride_where_it_does_not_fold():
    after = run(canonical("bert"), AwqScale(ratio=0.5, ride=True))
    riding = after.nodes(torch.ops.aten.mul.Tensor)
    assert len(riding) == len([detail for detail in details(after) if "rides" in detail]) > 0
