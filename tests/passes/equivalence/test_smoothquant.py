"""SmoothQuant scales: folded where dataflow proves it, riding elsewhere."""

import pytest
import torch
from torch import Tensor, nn

from fxopt.analysis.calibration import collect, linear_inputs
from fxopt.errors import RecipeError
from fxopt.ir.program import Program
from fxopt.passes.equivalence.awq_scale import AwqScale
from fxopt.passes.equivalence.readers import readers
from fxopt.passes.equivalence.smoothquant import SmoothQuant
from fxopt.passes.equivalence.untie import Untie
from fxopt.passes.quantization.grid import choose_grid
from fxopt.passes.quantization.options import WeightOptions
from tests.passes.equivalence.harness import (
    calibration_of,
    canonical,
    details,
    idempotent,
    plain,
    refusals,
    run,
    sites,
)

# norm -> q, k, v; v -> o; norm -> gate, up; up -> down in two layers, and the last norm -> head.
FOLDED = {"llama": 9, "qwen3": 9, "phi3": 9, "gemma3": 12}


@pytest.mark.parametrize("model", FOLDED)
def test_every_site_of_a_pre_norm_decoder_folds(model):
    after = run(canonical(model), SmoothQuant(ride=False))
    assert len(sites(after)) == FOLDED[model]
    assert all("scale folded" in detail for detail in details(after))
    assert len(after.nodes(torch.ops.aten.mul.Tensor)) == len(
        canonical(model).nodes(torch.ops.aten.mul.Tensor)
    )


def test_post_norms_ride_and_say_why():
    after = run(canonical("bert"), SmoothQuant())
    done = details(after)
    assert sum("scale folded" in detail for detail in done) == 2  # v -> o
    riding = [detail for detail in done if "rides" in detail]
    assert sum("a norm measures all of it together" in detail for detail in riding) == 4
    assert sum("comes out of aten.gelu.default" in detail for detail in riding) == 2


def test_riding_can_be_refused():
    after = run(canonical("bert"), SmoothQuant(ride=False))
    assert len(sites(after)) == 2
    assert "a norm measures all of it together" in refusals(after)


def test_a_tied_head_is_refused_until_it_is_untied():
    tied = run(canonical("tied-llama"), SmoothQuant())
    assert "run untie first" in refusals(tied)
    assert len(sites(tied)) == 8
    assert len(sites(run(canonical("tied-llama"), Untie(), SmoothQuant()))) == 9


def test_half_makes_both_sides_equally_large():
    """At alpha 0.5 max|x_j / s_j| and max|W_j s_j| are both sqrt(a_j w_j)."""
    after = run(canonical("bert"), SmoothQuant(alpha=0.5))
    samples = _samples(after)
    seen = collect(after, linear_inputs(after), samples)
    checked = 0
    for node in after.nodes(torch.ops.aten.mul.Tensor):
        reach = torch.maximum(-seen["minimum"][node.name], seen["maximum"][node.name])
        weights = [after.weight(str(user.args[1].target)) for user in node.users]
        columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        torch.testing.assert_close(reach, columns, rtol=1e-4, atol=1e-6)
        checked += 1
    assert checked == 7


def _samples(program):
    from fxopt.analysis.samples import Sample

    return [Sample(values) for values in program.examples[:2]]


def test_smoothing_twice_is_smoothing_once_at_half():
    idempotent(run(canonical("bert"), SmoothQuant(alpha=0.5)), SmoothQuant(alpha=0.5))


def test_each_site_may_choose_its_alpha():
    after = run(canonical("llama"), SmoothQuant(alpha="auto"))
    assert sites(after)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_an_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(RecipeError, match="between 0 and 1"):
        SmoothQuant(alpha=alpha)


class Applied(nn.Module):
    """One block several times, as in ALBERT: what its linears read shares one symmetry."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        with torch.no_grad():
            self.up.weight[[3, 9]] *= 20

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(x + self.down(torch.relu(self.up(x))))
        return x


def applied() -> Program:
    torch.manual_seed(0)
    return plain(Applied(), torch.randn(2, 5, 16))


def reach_of_all(program: Program, name: str) -> Tensor:
    """The largest |x| of each channel over all that the linears of a weight read."""
    seen = collect(program, linear_inputs(program), calibration_of(program))
    sources = [
        node.args[0].name
        for node in program.nodes(torch.ops.aten.linear.default)
        if str(node.args[1].target) == name
    ]
    ends = [torch.maximum(-seen["minimum"][s], seen["maximum"][s]) for s in sources]
    assert len(ends) == 3
    return torch.stack(ends).amax(0)


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_a_block_that_is_applied_several_times_is_scaled_once(alpha):
    before = applied()
    options = {"alpha": alpha, "ride": False}
    after = run(before, SmoothQuant(**options))
    assert sites(after) == ["up"]
    down = "down.weight"
    if alpha == 0.5:
        reach, columns = reach_of_all(after, down), after.weight(down).abs().amax(0)
        torch.testing.assert_close(reach, columns, rtol=1e-4, atol=1e-6)
        idempotent(after, SmoothQuant(**options))


def test_awq_scales_what_is_applied_several_times_once_by_all_that_it_reads():
    before = applied()
    after = run(before, AwqScale(ratio=0.5))
    assert sites(after) == ["up"]
    seen = collect(before, linear_inputs(before), calibration_of(before))["mean_abs"]
    sources = [node.args[0].name for node in before.nodes(torch.ops.aten.linear.default)][1::2]
    mean = torch.stack([seen[name] for name in sources]).amax(0).double().sqrt()
    expected = mean / (mean.max() * mean.min()).sqrt()
    ratio = after.weight("down.weight") / before.weight("down.weight")
    torch.testing.assert_close(ratio.double(), expected.expand_as(ratio), rtol=1e-4, atol=1e-4)


def experts_error(before: Program, after: Program, options: WeightOptions) -> tuple[float, float]:
    """What rounding does to the outputs of the experts, without a scale and with it."""
    rows = collect(before, linear_inputs(before), calibration_of(before), rows=512)["rows"]
    (router,) = [s for s in readers(before) if s.weights == ("model.layers.0.mlp.gate.weight",)]
    x = rows[router.source.name]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight, scaled = (p.weight(name).flatten(0, 1) for p in (before, after))
    scale = (scaled / weight).nanmedian(0).values
    errors = []
    for factors in (torch.ones_like(scale), scale):
        wide = weight * factors
        difference = choose_grid(wide, options).round(wide) / factors - weight
        errors.append(float((x @ difference.T).square().sum()))
    return errors[0], errors[1]


@pytest.mark.parametrize("quiet", ["model.layers.0.mlp.gate.weight", "none"])
def test_experts_count_in_the_scale_of_what_they_read(quiet):
    """Channels of the norm are loud; once the router hardly reads them."""
    before, options = canonical("mixtral"), WeightOptions("int4", "group", 16)
    loud = torch.arange(0, 32, 8)
    for name, factor in (("model.layers.0.post_attention_layernorm.weight", 20), (quiet, 0.01)):
        if name != "none":
            weight = before.weight(name).clone()
            weight[..., loud] *= factor
            before.set_weight(name, weight)
    unscaled, scaled = experts_error(before, run(before, AwqScale(weights=options)), options)
    assert scaled < 0.8 * unscaled
    after = run(before, SmoothQuant(alpha=0.5))
    reach = reach_of_reader(after, "model.layers.0.mlp.gate.weight")
    names = ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.gate_up_proj")
    columns = [after.weight(name).flatten(0, -2).abs().amax(0) for name in names]
    torch.testing.assert_close(reach, torch.stack(columns).amax(0), rtol=1e-3, atol=1e-5)


def reach_of_reader(program: Program, name: str) -> Tensor:
    seen = collect(program, linear_inputs(program), calibration_of(program))
    (reader,) = [reader for reader in readers(program) if reader.weights == (name,)]
    source = reader.source.name
    return torch.maximum(-seen["minimum"][source], seen["maximum"][source])


@pytest.mark.parametrize("scaling", [SmoothQuant(alpha=0.5), SmoothQuant("auto"), AwqScale(0.5)])
def test_what_writes_an_activation_does_not_count_as_what_reads_it(scaling):
    """A bias of shape [1, 1, d] has its channels where experts have theirs."""

    class Shifted(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
            self.shift = nn.Parameter(50 * torch.randn(24).reshape(shape))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) + self.shift)

    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    flat, deep = (run(plain(Shifted(*shape), x), scaling) for shape in ((24,), (1, 1, 24)))
    torch.testing.assert_close(flat.weight("down.weight"), deep.weight("down.weight"))
    assert sites(deep)
