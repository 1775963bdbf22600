"""LLM.int8(): outlier columns in floating point, the others in int8."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.analysis.execution import run
from fxopt.analysis.samples import Sample
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Level, Program
from fxopt.ir.stored_codes import is_stored_weight, stored_values
from fxopt.lowering import LoweringOptions, lower
from fxopt.passes.quantization.llm_int8 import LlmInt8
from fxopt.passes.quantization.quantize import Quantize
from tests.graphs import signature_of
from tests.models import canonical_program
from tests.passes.quantization.test_quantize import (
    TOKEN,
    Wide,
    apply,
    as_sample,
    bert_batch,
    captured,
    manager,
    site_paths,
)

aten = torch.ops.aten
ops = torch.ops.fxopt
# Inliers in int8 move an output by less; an outlier column that is lost moves one by more.
ROUNDED = {"rtol": 0.05, "atol": 0.5}


def outlying(seed: int) -> torch.Tensor:
    """Activations below 3 but for columns 2 and 5, which reach 50 and more."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 8, generator=generator).clamp(-3, 3)
    x[..., 2], x[..., 5] = 50 + x[..., 2], 80 * x[..., 5] + 1
    return x


def split_program(seed: int = 0, **options) -> tuple[Program, Program, torch.Tensor]:
    torch.manual_seed(seed)
    before, x = captured(Wide(), torch.randn(2, 3, 8)), outlying(seed)
    return before, manager([Sample([x])]).run(before, [LlmInt8(include=("first",), **options)]), x


def test_an_infinite_threshold_is_vector_wise_int8():
    program = canonical_program("bert")
    samples = [as_sample(program, bert_batch(3, 9, 0))]
    found = manager(samples).run(program, [LlmInt8(threshold=float("inf"))])
    plain = apply(program, activations=TOKEN)
    assert site_paths(found) == site_paths(plain)
    for one, other in zip(
        run(found, samples[0].inputs), run(plain, samples[0].inputs), strict=True
    ):
        assert torch.equal(one, other)
    assert found.level is Level.QUANTIZED


def test_at_threshold_zero_the_linears_stay_in_floating_point():
    program = canonical_program("bert")
    samples = [as_sample(program, bert_batch(3, 9, 0))]
    with pytest.warns(UserWarning, match="inputs are outliers at threshold 0"):
        found = manager(samples).run(program, [LlmInt8(threshold=0.0)])
    assert signature_of(found) == signature_of(program)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_split_is_exact_but_for_rounding(seed):
    before, after, x = split_program(seed)
    first = before.nodes(aten.linear.default)[0]
    weight, bias = (before.constant(first.args[i]) for i in (1, 2))
    inner, outer = after.nodes(aten.linear.default)[:2]
    values = stored_values(after, inner.args[1])
    assert bool((values[:, [2, 5]] == 0).all())
    assert torch.equal(after.constant(outer.args[1]), weight[:, [2, 5]])
    _, scale, _, _ = inner.args[1].args[:4]
    step = after.constant(scale)
    masked = torch.where(torch.tensor([2, 5])[:, None] == torch.arange(8), 1, 0).sum(0) > 0
    assert bool(((values - torch.where(masked, 0, weight)).abs() <= step * 0.5001).all())
    exact = torch.nn.functional.linear(x, weight, bias)
    found: list[torch.Tensor] = []
    total = next(iter(inner.users))
    run(after, [x], lambda node, value: found.append(value) if node.name == total.name else None)
    # One step of a token is that of its inliers, none of which is beyond 3.
    bound = 8 * 3 / 127 / 2 * float(weight.abs().max()) + float(step.max()) / 2 * 8 * 3.1
    assert float((found[0] - exact).abs().max()) <= bound


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), outliers=st.sampled_from(["static", "dynamic"]))
def test_the_split_is_exact_where_nothing_is_rounded(seed, outliers):
    """Whole numbers up to 127 lie on the grid: what is left is X_o W_o + X_r W_r = X W."""
    generator = torch.Generator().manual_seed(seed)
    program = captured(Wide(), torch.randn(2, 3, 8))
    weight = torch.randint(-127, 128, (*program.weight("first.weight").shape,), generator=generator)
    x = torch.randint(-127, 128, (2, 3, 8), generator=generator)
    weight[:, 0], x[..., 1] = 127, -127  # the largest of each row and token
    program.set_weight("first.weight", weight.float())
    x = x.float()
    x[..., [2, 5]] = 300.0 + torch.randint(0, 100, (2, 3, 2), generator=generator)
    options = {"threshold": 200.0, "include": ("first",), "outliers": outliers}
    after = manager([Sample([x])]).run(program, [LlmInt8(**options)])
    assert is_stored_weight(after.nodes(aten.linear.default)[0].args[1])
    first = program.nodes(aten.linear.default)[0]
    exact = torch.nn.functional.linear(x, weight.float(), program.constant(first.args[2]))
    found: list[torch.Tensor] = []
    total = next(iter(after.nodes(aten.linear.default)[0].users))
    run(after, [x], lambda node, value: found.append(value) if node.name == total.name else None)
    assert torch.allclose(found[0], exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_dynamic_at_threshold_zero_leaves_activations_in_floating_point():
    before, after, x = split_program(outliers="dynamic", threshold=0.0)
    inner = after.nodes(aten.linear.default)[0]
    bias = before.constant(before.nodes(aten.linear.default)[0].args[2])
    exact = torch.nn.functional.linear(x, stored_values(after, inner.args[1]), bias)
    found: list[torch.Tensor] = []
    total = next(iter(inner.users))
    run(after, [x], lambda node, value: found.append(value) if node.name == total.name else None)
    assert torch.allclose(found[0], exact, rtol=1e-5, atol=1e-5)


def test_outliers_count_in_no_scale_of_a_token():
    _, after, x = split_program()
    seen: list[torch.Tensor] = []
    qparams = after.nodes(ops.choose_qparams.default)[0]
    run(after, [x], lambda n, value: seen.append(value[0]) if n.name == qparams.name else None)
    inliers = x[..., [0, 1, 3, 4, 6, 7]].abs().amax(-1, keepdim=True)
    assert torch.allclose(seen[0], inliers / 127)


def test_it_loses_less_than_plain_int8_where_there_are_outliers():
    before, after, x = split_program()
    plain = manager().run(before, [Quantize(activations=TOKEN, include=("first",))])
    exact, found, whole = (run(program, [x])[0] for program in (before, after, plain))
    assert float((found - exact).norm()) < 0.3 * float((whole - exact).norm())
    assert "2 of 8 columns" in after.history[-1].sites[0].detail


def test_a_second_run_does_nothing():
    _, after, x = split_program()
    with pytest.warns(UserWarning, match="changed nothing"):
        again = manager([Sample([x])]).run(after, [LlmInt8(include=("first",))])
    assert signature_of(again) == signature_of(after)
    reasons = {refusal.reason for refusal in again.history[-1].refusals}
    assert "already quantized" in reasons
    assert any("was split" in reason for reason in reasons)


def test_what_it_refuses():
    with pytest.raises(RecipeError, match="threshold -1"):
        LlmInt8(threshold=-1.0)
    before = captured(Wide(), torch.randn(2, 3, 8))
    with pytest.raises(CalibrationError, match="needs calibration data"):
        manager().run(before, [LlmInt8()])


def test_lowered_the_mask_rides_in_the_kernel():
    _, program, x = split_program()
    lowered = lower(program, LoweringOptions(target="cpu", speed_gate=False)).program
    [node] = lowered.nodes(ops.dynamic_linear_w8a8.default)
    assert not lowered.nodes(aten.mul.Tensor, ops.quantize.default)
    mask = lowered.constant(node.args[-1])
    assert mask.tolist() == [float(j not in (2, 5)) for j in range(8)]
    assert torch.allclose(run(lowered, [x])[0], run(program, [x])[0], atol=1e-4)


def test_dynamic_columns_are_those_of_the_call():
    _, after, x = split_program(outliers="dynamic")
    seen: dict[str, torch.Tensor] = {}
    run(after, [x], lambda node, value: seen.__setitem__(node.name, value))
    inner, outer = after.nodes(aten.linear.default)[:2]
    assert inner.args[1] is outer.args[1]  # one weight, in int8
    columns = seen[outer.args[0].name].abs().amax((0, 1)) > 0
    assert columns.nonzero().flatten().tolist() == [2, 5]
    quiet = torch.randn(1, 3, 8).clamp(-3, 3)
    run(after, [quiet], lambda node, value: seen.__setitem__(node.name, value))
    assert not seen[outer.args[0].name].any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_dynamic_columns_lose_nothing_but_the_rounding_of_inliers_and_weights(seed):
    before, after, x = split_program(seed, outliers="dynamic")
    first = before.nodes(aten.linear.default)[0]
    weight, bias = (before.constant(first.args[i]) for i in (1, 2))
    inner = after.nodes(aten.linear.default)[0]
    values = stored_values(after, inner.args[1])
    total = next(user for user in inner.users)
    found: list[torch.Tensor] = []
    run(after, [x], lambda node, value: found.append(value) if node.name == total.name else None)
    exact = torch.nn.functional.linear(x, values, bias)
    bound = 8 * 3 / 127 / 2 * float(values.abs().max())
    assert float((found[0] - exact).abs().max()) <= bound * 1.001
    assert float((values - weight).abs().max()) <= float(weight.abs().amax()) / 127


def test_dynamic_at_an_infinite_threshold_is_vector_wise_int8_without_data():
    program = canonical_program("bert")
    inputs = as_sample(program, bert_batch(3, 9, 0)).inputs
    found = manager([]).run(program, [LlmInt8(threshold=float("inf"), outliers="dynamic")])
    plain = apply(program, activations=TOKEN)
    for one, other in zip(run(found, inputs), run(plain, inputs), strict=True):
        assert torch.equal(one, other)
    again = manager([])
    with pytest.warns(UserWarning, match="already quantized"):
        second = again.run(found, [LlmInt8(outliers="dynamic")])
    assert signature_of(second) == signature_of(found)


def test_dynamic_lowered_uses_both_int8_kernels():
    program = canonical_program("llama")
    after = manager([]).run(program, [LlmInt8(outliers="dynamic", exclude=("lm_head",))])
    lowered = lower(after, LoweringOptions(target="cpu", speed_gate=False)).program
    names = {str(node.target) for node in lowered.nodes()}
    assert any("linear_w8a16" in name for name in names)
    assert any("dynamic_linear_w8a8" in name for name in names)
    for inputs in program.examples[:2]:
        for a, b in zip(run(lowered, inputs), run(after, inputs), strict=True):
            if a.is_floating_point():
                assert float((a - b).norm()) <= 1e-3 * float(b.norm() + 1e-6)


def test_outliers_are_those_of_the_model_before_any_linear_was_split():
    """The second linear reads what the split of the first gives, without anything between."""

    class Pair(Wide):
        def forward(self, x):
            return self.second(self.first(x))

    torch.manual_seed(0)
    program, x = captured(Pair(), torch.randn(2, 3, 8)), outlying(0)
    first = program.nodes(aten.linear.default)[0]
    weight, bias = (program.constant(first.args[i]) for i in (1, 2))
    hidden = torch.nn.functional.linear(x, weight, bias)
    threshold = float(hidden.abs().amax((0, 1)).median())
    after = manager([Sample([x])]).run(program, [LlmInt8(threshold=threshold)])
    expected = int((hidden.abs().amax((0, 1)) >= threshold).sum())
    assert [site.detail.rpartition("channel, ")[2] for site in after.history[-1].sites] == [
        f"{int((x.abs().amax((0, 1)) >= threshold).sum())} of 8 columns in floating point",
        f"{expected} of 8 columns in floating point",
    ]
    assert torch.allclose(run(after, [x])[0], run(program, [x])[0], **ROUNDED)


class Again(Wide):
    """One linear on two inputs with outliers in different columns."""

    def forward(self, x):
        return self.first(x) + self.first(x.flip(-1))


@pytest.mark.parametrize("outliers", ["static", "dynamic"])
def test_a_weight_that_two_linears_read_is_held_once(outliers):
    torch.manual_seed(0)
    program, x = captured(Again(), torch.randn(2, 3, 8)), outlying(0)
    after = manager([Sample([x])]).run(program, [LlmInt8(outliers=outliers)])
    stored = [name for name, value in after.weights().items() if value.dtype == torch.int8]
    assert len(stored) == 1
    if outliers == "static":  # columns 2 and 5 of either: 2, 5 and their mirrors 5, 2
        details = {site.detail for site in after.history[-1].sites}
        assert details == {"int8 per token and channel, 2 of 8 columns in floating point"}
        assert sum("outlier_columns" in name for name in after.weights()) == 1
    assert torch.allclose(run(after, [x])[0], run(program, [x])[0], **ROUNDED)


def test_outliers_of_a_shared_weight_are_those_of_all_that_read_it():
    class Shifted(Wide):
        def forward(self, x):
            return self.first(x) + self.first(x.roll(1, -1))

    torch.manual_seed(0)
    program, x = captured(Shifted(), torch.randn(2, 3, 8)), outlying(0)
    after = manager([Sample([x])]).run(program, [LlmInt8()])
    (columns,) = (value for name, value in after.weights().items() if name.endswith(".outliers"))
    assert columns.tolist() == [2, 3, 5, 6]
    assert torch.allclose(run(after, [x])[0], run(program, [x])[0], **ROUNDED)


def test_a_weight_at_the_root_of_the_model_is_split():
    torch.manual_seed(0)
    program, x = captured(torch.nn.Linear(8, 8), torch.randn(2, 3, 8)), outlying(0)
    after = manager([Sample([x])]).run(program, [LlmInt8()])
    assert {"inlier_mask", "outliers", "outlier_columns"} < set(after.weights())
    assert torch.allclose(run(after, [x])[0], run(program, [x])[0], **ROUNDED)
    with pytest.warns(UserWarning, match="was split"):
        again = manager([Sample([x])]).run(after, [LlmInt8()])
    assert signature_of(again) == signature_of(after)
