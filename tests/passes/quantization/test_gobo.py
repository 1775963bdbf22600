"""GOBO: its invariants, what it stores, and that its kernel computes the same."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.errors import RecipeError
from fxopt.ir.program import Level, Program, module_path
from fxopt.ir.stored_codes import code_names, is_stored_weight, stored_values
from fxopt.passes.quantization.codebook import learn_codebook, outlier_mask
from fxopt.passes.quantization.gobo import Gobo
from fxopt.passes.quantization.grid import choose_grid
from fxopt.passes.quantization.options import WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.verify import Verifier
from tests.graphs import signature_of
from tests.lowering.test_lower import UNTIMED, check, kernels, lower
from tests.models import canonical_program, optimize_zoo
from tests.passes.quantization.test_quantize import captured

aten = torch.ops.aten
ops = torch.ops.fxopt
# The weights of the zoo have a standard deviation of 0.02 and few outliers at -4.
MANY = 0.5
seeds = st.integers(0, 10_000)
bits_of_codes = st.sampled_from([2, 3, 4])


def weight(seed: int, shape: tuple[int, ...] = (12, 40), dtype=torch.float32) -> Tensor:
    """Normal values with some far away, zeros and equal ones."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 30, shape, generator=generator)
    x = torch.where(kind == 0, 10 * x, x)
    x = torch.where(kind == 1, 0.0, x)
    x = torch.where(kind == 2, 0.03, x)
    return x.to(dtype)


def rounded(w: Tensor, bits: int, threshold: float) -> tuple[Tensor, Tensor]:
    """The values and outliers that the pass stores for a weight."""
    outliers = outlier_mask(w, threshold)
    found = learn_codebook(w[~outliers], bits)
    values = found.table.to(w.dtype)[found.encode(w, w.dtype).int()]
    return torch.where(outliers, w, values), outliers


# --- the table ------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(seed=seeds, threshold=st.floats(-8, 1))
def test_outliers_are_the_improbable_ones(seed, threshold):
    w = weight(seed).double()
    density = torch.distributions.Normal(w.mean(), w.std(correction=0)).log_prob(w)
    sure = (density - threshold).abs() > 1e-6
    assert torch.equal(outlier_mask(w, threshold)[sure], (density < threshold)[sure])


@settings(max_examples=80, deadline=None)
@given(seed=seeds, bits=bits_of_codes, bf16=st.booleans(), threshold=st.floats(-6, 0))
def test_outliers_stay_and_the_rest_is_few_values(seed, bits, bf16, threshold):
    w = weight(seed, dtype=torch.bfloat16 if bf16 else torch.float32)
    values, outliers = rounded(w, bits, threshold)
    assert torch.equal(values[outliers], w[outliers])
    assert len(values[~outliers].unique()) <= 2**bits


@settings(max_examples=80, deadline=None)
@given(seed=seeds, bits=bits_of_codes)
def test_the_error_falls_and_each_weight_goes_to_its_nearest(seed, bits):
    w = weight(seed).double()
    found = learn_codebook(w.flatten(), bits)
    assert all(
        after < before for before, after in zip(found.errors, found.errors[1:], strict=False)
    )
    assert bool((found.table.diff() >= 0).all())
    distances = (w[..., None] - found.table).abs()
    codes = found.encode(w)
    mine = distances.gather(-1, codes.long()[..., None])[..., 0]
    assert torch.allclose(mine, distances.amin(-1), atol=1e-15)
    assert math.isclose(float(mine.sum()), found.errors[-1], rel_tol=1e-9, abs_tol=1e-12)


@settings(max_examples=80, deadline=None)
@given(seed=seeds, bits=bits_of_codes, a=st.floats(0.01, 100), c=st.floats(-3, 3))
def test_codes_follow_a_scale_and_a_shift(seed, bits, a, c):
    """A density is in the unit of the weights: the threshold moves by -log a."""
    # Zeros and equal values could lie on the edge of a bin, where rounding decides.
    generator = torch.Generator().manual_seed(seed)
    w = 0.1 * torch.randn(12, 40, generator=generator, dtype=torch.float64)
    found = []
    for values, threshold in ((w, -1.0), (a * w + c, -1.0 - math.log(a))):
        outliers = outlier_mask(values, threshold)
        found.append((outliers, learn_codebook(values[~outliers], bits).encode(values)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@settings(max_examples=60, deadline=None)
@given(seed=seeds, bits=bits_of_codes)
def test_a_table_is_mirrored_with_the_weights(seed, bits):
    w = 0.1 * torch.randn(12, 40, generator=torch.Generator().manual_seed(seed)).double()
    assert torch.equal(outlier_mask(w, -1.0), outlier_mask(-w, -1.0))
    plain, mirrored = learn_codebook(w, bits), learn_codebook(-w, bits)
    assert torch.allclose(mirrored.table, -plain.table.flip(0), rtol=1e-12, atol=1e-15)
    assert torch.equal(mirrored.encode(-w), 2**bits - 1 - plain.encode(w))


@settings(max_examples=80, deadline=None)
@given(seed=seeds, bits=bits_of_codes, bf16=st.booleans(), exponent=st.sampled_from([0, -38, -44]))
def test_values_of_the_table_stay_what_they_are(seed, bits, bf16, exponent):
    """Zeros of both signs and denormals too, each at the nearest of what the table holds."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    w = (weight(seed, dtype=torch.float64) * 10.0**exponent).to(dtype)
    w[0] = -0.0
    found = learn_codebook(w, bits)
    table = found.table.to(dtype)
    once = table[found.encode(w, dtype).int()]
    assert torch.equal(table[found.encode(once, dtype).int()], once)
    nearest = (w.double()[..., None] - table.double()).abs().amin(-1)
    assert torch.equal((once.double() - w.double()).abs(), nearest)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, bits=bits_of_codes)
def test_a_table_errs_less_than_equal_steps(seed, bits):
    w = 0.05 * torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    grid = choose_grid(w, WeightOptions(f"int{bits}", "tensor"))
    errors = [float((r - w).abs().sum()) for r in (rounded(w, bits, -4.0)[0], grid.round(w))]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_a_constant_has_no_outliers_and_is_exact(bits, value):
    w = torch.full((5, 7), value)
    values, outliers = rounded(w, bits, -4.0)
    assert not bool(outliers.any())
    assert torch.equal(values, w)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 16])
def test_as_few_values_as_the_table_holds_are_exact(count):
    w = torch.linspace(-1, 1, count).repeat(3)
    found = learn_codebook(w, 4)
    assert torch.equal(found.table.float()[found.encode(w).int()], w)


def test_slabs_are_the_whole():
    w = torch.randn(700, 801, generator=torch.Generator().manual_seed(0))
    found = learn_codebook(w, 3)
    middles = (found.table[1:] + found.table[:-1]) / 2
    assert torch.equal(found.encode(w).long(), torch.bucketize(w.double(), middles))


# --- on programs ----------------------------------------------------------------------------


def apply(program: Program, **options) -> Program:
    return Manager(Verifier((), mode="off")).run(program, [Gobo(**options)])


def weights_of(program: Program, target=aten.linear.default, index: int = 1) -> dict:
    return {module_path(node): node.args[index] for node in program.nodes(target)}


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_linear_is_stored_and_nothing_else_changes(name, bits):
    before = canonical_program(name)
    text, held = signature_of(before), dict(before.weights())
    after = apply(before, bits=bits, threshold=MANY)
    assert signature_of(before) == text
    assert after.level is Level.QUANTIZED
    found = weights_of(after)
    assert {site.path for site in after.history[-1].sites} == set(found)
    counts = []
    for path, node in weights_of(before).items():
        w = before.constant(node)
        values, outliers = rounded(w, bits, MANY)
        assert is_stored_weight(found[path])
        assert torch.equal(stored_values(after, found[path]), values)
        names = list(code_names(found[path]))
        assert after.weight(names[0]).nbytes == w.shape[0] * -(-w.shape[1] * bits // 8)
        assert len(names) == (4 if bool(outliers.any()) else 2)
        counts.append(int(outliers.sum()))
    assert sum(counts) > 100
    left = {key: value for key, value in after.weights().items() if key in held}
    assert all(value.data_ptr() == held[key].data_ptr() for key, value in left.items())
    old = [(n.name, str(n.target)) for n in before.nodes()]
    new = {ops.unpack.default, ops.lookup.default, aten.put.default}
    assert old == [(n.name, str(n.target)) for n in after.nodes() if n.target not in new]
    again = {"bits": bits, "threshold": MANY}
    with pytest.warns(UserWarning, match="changed nothing.*already quantized"):
        assert signature_of(apply(after, **again)) == signature_of(after)


def test_embeddings_are_taken_on_request():
    before = canonical_program("bert")
    reasons = {r.site: r.reason for r in apply(before).history[-1].refusals}
    tables = weights_of(before, aten.embedding.default, 0)
    assert set(reasons) == set(tables)
    assert set(reasons.values()) == {"an embedding; embeddings: true takes it"}
    after = apply(before, embeddings=True)
    assert not after.history[-1].refusals
    assert all(is_stored_weight(n) for n in weights_of(after, aten.embedding.default, 0).values())
    assert after.byte_count() < 0.4 * before.byte_count()


def test_a_tied_weight_is_stored_once():
    after = apply(canonical_program("gpt2"), embeddings=True)
    head, table = (
        weights_of(after, *key)[path]
        for key, path in (((), "lm_head"), ((aten.embedding.default, 0), "transformer.wte"))
    )
    assert list(code_names(head)) == list(code_names(table))


class One(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.lin = nn.Linear(values.shape[1], values.shape[0])
        self.lin.weight.data = values

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def of_one(values: Tensor) -> Program:
    return captured(One(values), torch.randn(2, 3, values.shape[1]))


@pytest.mark.parametrize(
    ("spread", "shape", "reason"),
    [
        (100, (8, 16), "all 128 weights are outliers at threshold -4"),
        (18, (8, 16), "the weight 512"),
        (1, (1, 2), "the weight 8"),
    ],
)
def test_what_would_not_be_smaller_is_refused(spread, shape, reason):
    values = spread * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="changed nothing"):
        after = apply(of_one(values))
    assert reason in after.history[-1].refusals[0].reason
    assert not after.nodes(ops.lookup.default)


def test_weights_that_are_not_finite_are_refused():
    program = of_one(torch.randn(8, 16))
    program.set_weight(str(weights_of(program)["lin"].target), torch.full((8, 16), torch.inf))
    with pytest.warns(UserWarning, match="NaN or infinity"):
        apply(program)


def test_a_constant_weight_and_a_selection():
    program = of_one(torch.full((8, 16), 0.1))
    after = apply(program)
    assert torch.equal(stored_values(after, weights_of(after)["lin"]), torch.full((8, 16), 0.1))
    with pytest.warns(UserWarning, match="excluded by 'lin'"):
        apply(program, exclude=("lin",))


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"bit": 3}, {"threshold": "high"}])
def test_wrong_options_are_recipe_errors(wrong):
    with pytest.raises(RecipeError, match="gobo"):
        Recipe.resolve({"passes": ["canonicalize", {"gobo": wrong}]}).build()


# --- lowered, and as a whole ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_kernel_computes_what_the_graph_does(name, bits):
    program = apply(canonical_program(name), bits=bits, threshold=MANY)
    lowered = lower(program, UNTIMED)
    linears = {name: count for name, count in kernels(lowered.program).items() if "linear" in name}
    assert linears == {"linear_w4a16": len(program.nodes(aten.linear.default))}
    assert not lowered.program.nodes(ops.unpack.default, ops.lookup.default, aten.put.default)
    assert check(program, lowered)["relative_error"] < 1e-6


@pytest.mark.parametrize("bits", [3, 4])
def test_bfloat16_is_stored_and_lowered_alike(bits):
    module = One(0.05 * torch.randn(24, 48, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 5, 48).bfloat16()
    program = captured(module.bfloat16(), x)
    after = apply(program, bits=bits, threshold=0.0)
    (node,) = weights_of(after).values()
    w = program.constant(weights_of(program)["lin"])
    values = stored_values(after, node)
    assert values.dtype == torch.bfloat16
    assert torch.equal(values, rounded(w, bits, 0.0)[0])
    lowered = lower(after, UNTIMED)
    assert kernels(lowered.program) == {"linear_w4a16": 1}
    expected, found = (p.graph_module(x)[0].float() for p in (after, lowered.program))
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_it_is_verified_saved_and_loaded(tmp_path):
    recipe = {"passes": ["canonicalize", {"gobo": {"threshold": MANY, "embeddings": True}}]}
    optimized = optimize_zoo("bert", recipe, verify="full")
    optimized.save_pretrained(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6).long()}
    expected, found = (m(**batch).last_hidden_state for m in (optimized, loaded))
    assert torch.equal(found, expected)


def test_a_model_is_closer_than_with_equal_steps():
    from tests.passes.quantization.test_gptq import output_distance, samples_of

    before = canonical_program("bert")
    samples = samples_of(before, 4)
    plain = Manager(Verifier((), mode="off")).run(before, [Quantize(WeightOptions("int3"))])
    found = output_distance(before, apply(before), samples)
    assert found < output_distance(before, plain, samples)
