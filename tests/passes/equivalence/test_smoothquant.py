"""SmoothQuant scales: folded where dataflow proves it, riding elsewhere."""

import pytest
import torch

from fxopt.analysis.calibration import collect, linear_inputs
from fxopt.errors import RecipeError
from fxopt.passes.equivalence.smoothquant import SmoothQuant
from fxopt.passes.equivalence.untie import Untie
from tests.passes.equivalence.harness import canonical, details, idempotent, refusals, run, sites

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
