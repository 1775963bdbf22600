"""AWQ's scales, with a given ratio and with the best one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

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
    plain,
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
            (reading,) = site.readings
            x = rows[reading.reader.source.name]
            for name in reading.weights:
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


class NormThenLinears(nn.Module):
    """Two linears of different widths on one norm, without biases: nothing else to scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.first, self.second = (nn.Linear(16, n, bias=False) for n in (8, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.cat([self.first(x), self.second(x)], -1)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0, 2.5),
    options=st.sampled_from(
        [INT3, WeightOptions("int4"), WeightOptions("int4", "group", 4, symmetric=False)]
    ),
)
def test_the_ratio_is_the_best_by_its_formula(seed, spread, options):
    """Whatever the channels: the error that the docstring gives, in float64, token by token."""
    torch.manual_seed(seed)
    model = NormThenLinears()
    model.norm.weight.data = torch.exp(spread * torch.randn(16))
    model.norm.bias.data = 0.1 * torch.randn(16) * model.norm.weight.data
    before = plain(model, torch.randn(2, 7, 16))
    after = run(before, AwqScale(weights=options))
    batches = [sample.inputs[0] for sample in calibration_of(before)]
    rows = torch.cat([model.norm(x).detach().reshape(-1, 16) for x in batches]).double()
    weights = [linear.weight.detach().double() for linear in (model.first, model.second)]
    energies = sum((rows @ w.T).square().sum(1) for w in weights)
    counts = 1 / (energies + energies.median())
    mean = (rows.abs() * counts.sqrt()[:, None]).mean(0)

    def error(scale: Tensor) -> float:
        total = 0.0
        for w in weights:
            wide = (w * scale).float()
            moved = choose_grid(wide, options).round(wide).double() / scale - w
            total += float((rows @ moved.T).square().sum(1) @ counts)
        return total

    def power(ratio: float) -> Tensor:
        scale = (mean**ratio).clamp(1e-4)
        return scale / torch.sqrt(scale.max() * scale.min())

    errors = [error(power(step / 20)) for step in range(20)]
    (name,) = [n for n in after.weights() if n.startswith("norm") and n.endswith("weight")]
    found = error(model.norm.weight.detach().double() / after.weight(name).double())
    assert found <= min(errors) * 1.001
    assert found <= errors[0] * 1.001  # ratio 0: rounding to nearest


def test_a_scale_can_ride_where_it_does_not_fold():
    after = run(canonical("bert"), AwqScale(ratio=0.5, ride=True))
    riding = after.nodes(torch.ops.aten.mul.Tensor)
    assert len(riding) == len([detail for detail in details(after) if "rides" in detail]) > 0
