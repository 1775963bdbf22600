"""GPTQ: its invariants, what it stores, and what it does when the calibration data is poor."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.analysis.lockstep import Lockstep
from fxopt.analysis.samples import Sample
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Level, Program, module_path
from fxopt.ir.stored_codes import is_stored_weight, stored_values
from fxopt.passes.base import Context
from fxopt.passes.quantization import gptq
from fxopt.passes.quantization.compensation import compensated, hessian, output_error
from fxopt.passes.quantization.gptq import Gptq, _Rounding
from fxopt.passes.quantization.grid import choose_grid
from fxopt.passes.quantization.options import WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.verify import Verifier
from tests.graphs import signature_of
from tests.models import canonical_program
from tests.passes.quantization.test_quantize import Wide, as_sample, bert_batch, captured

aten = torch.ops.aten
GRANULARITIES = [
    {"granularity": "tensor"},
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 8},
    {"granularity": "block", "block_size": (2, 8)},
]
seeds = st.integers(0, 10_000)
options = st.builds(
    lambda dtype, granularity, symmetric, search: WeightOptions(
        dtype,
        symmetric=symmetric or not dtype.startswith("int"),
        range=search,
        **granularity,
    ),
    st.sampled_from(["int8", "int4", "int3", "int2", "nf4", "fp8_e4m3"]),
    st.sampled_from(GRANULARITIES),
    st.booleans(),
    st.sampled_from(["absmax", "mse"]),
)


def problem(seed: int, tokens: int = 80, inputs: int = 24, outputs: int = 12):
    """A weight and correlated inputs whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mix
    x = x * torch.logspace(-1, 1, inputs)
    return torch.randn(outputs, inputs, generator=generator), x


@settings(max_examples=60, deadline=None)
@given(chosen=options, seed=seeds, act_order=st.booleans(), static=st.booleans())
def test_white_inputs_give_rounding_to_nearest(chosen, seed, act_order, static):
    weight, _ = problem(seed)
    h = hessian([3 * torch.eye(24)], 0.01, act_order)
    found = compensated(weight, chosen, h, 16, static or act_order)
    assert torch.equal(found.values, choose_grid(weight, chosen).round(weight))
    assert found.share == 1.0


@settings(max_examples=60, deadline=None)
@given(chosen=options, seed=seeds, act_order=st.booleans(), block_size=st.sampled_from([1, 7, 128]))
def test_it_never_errs_more_than_rounding_and_stays_on_the_grid(
    chosen, seed, act_order, block_size
):
    weight, x = problem(seed)
    h = hessian([x[:50], x[50:]], 0.01, act_order)
    found = compensated(weight, chosen, h, block_size, act_order)
    nearest = choose_grid(weight, chosen).round(weight)
    errors = [output_error(weight - values, h) for values in (found.values, nearest)]
    assert float(errors[0].sum()) <= float(errors[1].sum()) * (1 + 1e-5)
    if chosen.block[0] == 1:
        assert bool((errors[0] <= errors[1] * (1 + 1e-5) + 1e-9).all())
    assert torch.equal(found.grid.round(found.values), found.values)
    assert found.share <= 1


def test_it_gains_much_where_inputs_are_correlated():
    shares = []
    for seed in range(8):
        weight, x = problem(seed)
        h = hessian([x], 0.01, True)
        shares.append(compensated(weight, WeightOptions("int3"), h, 128, True).share)
    assert sum(shares) / len(shares) < 0.6


def test_many_bits_are_exact():
    weight, x = problem(0)
    found = compensated(weight, WeightOptions("int8"), hessian([x], 0.01, True), 128, True)
    assert float((found.values - weight).abs().max()) < 0.02 * float(weight.abs().max())


def test_blocks_of_lazy_updates_change_nothing():
    weight, x = problem(3, inputs=32)
    h = hessian([x], 0.01, False)
    for granularity in GRANULARITIES:
        chosen = WeightOptions("int4", **granularity)
        whole = compensated(weight, chosen, h, 32, False)
        for block_size in (1, 8, 16):
            again = compensated(weight, chosen, h, block_size, False)
            assert torch.allclose(again.values, whole.values, atol=1e-4)


def test_equal_energies_leave_the_order_alone():
    x = torch.linalg.qr(torch.randn(64, 24, generator=torch.Generator().manual_seed(0)))[0]
    h = hessian([torch.sign(x)], 0.01, True)
    assert torch.equal(h.order, torch.arange(24))


def test_columns_that_were_never_reached_are_rounded_to_nearest():
    weight, x = problem(0)
    x[:, 5] = 0
    chosen = WeightOptions("int4")
    found = compensated(weight, chosen, hessian([x], 0.01, False), 128, True)
    nearest = choose_grid(weight, chosen).round(weight)
    assert torch.equal(found.values[:, 5], nearest[:, 5])


def test_a_hessian_of_few_tokens_is_damped_until_it_can_be_factorized():
    _, x = problem(0, tokens=3)
    assert hessian([1e4 * x], 1e-9, True).damping > 1e-9
    with pytest.raises(CalibrationError, match="never reached"):
        hessian([x[:0]], 0.01, True)


# --- on programs ----------------------------------------------------------------------------


def samples_of(program: Program, count: int = 3) -> list[Sample]:
    return [as_sample(program, bert_batch(3, 9, seed)) for seed in range(count)]


def apply(program: Program, samples, verify: str = "off", **chosen) -> Program:
    manager = Manager(Verifier(program.examples[:1], mode=verify), samples=lambda: samples)
    return manager.run(program, [Gptq(**chosen)])


def by_path(program: Program):
    return {module_path(node): node for node in program.nodes(aten.linear.default)}


INT4 = WeightOptions("int4", "group", 16)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_every_linear_is_stored_packed_and_nothing_else_changes(true_sequential):
    before = canonical_program("bert")
    text, weights = signature_of(before), dict(before.weights())
    after = apply(before, samples_of(before), weights=INT4, true_sequential=true_sequential)
    assert signature_of(before) == text
    assert after.level is Level.QUANTIZED
    linears = by_path(after)
    assert {site.path for site in after.history[-1].sites} == set(linears)
    for path, node in linears.items():
        assert is_stored_weight(node.args[1])
        original = before.constant(by_path(before)[path].args[1])
        codes = after.weight(str(node.args[1].args[0].args[0].target))
        assert codes.dtype == torch.uint8
        assert codes.numel() == original.numel() // 2
        error = (stored_values(after, node.args[1]) - original).norm() / original.norm()
        assert 0 < float(error) < 0.5
    left = {name: value for name, value in after.weights().items() if name in weights}
    assert all(value.data_ptr() == weights[name].data_ptr() for name, value in left.items())
    with pytest.warns(UserWarning, match="changed nothing.*already quantized"):
        again = apply(after, samples_of(before), weights=INT4)
    assert signature_of(again) == signature_of(after)


def output_distance(program: Program, other: Program, samples) -> float:
    total = 0.0
    for sample in samples:
        a, b = (p.graph_module(*sample.inputs)[0] for p in (program, other))
        real = sample.tokens
        total += float((a - b)[real].square().sum() / a[real].square().sum())
    return total


def test_outputs_are_closer_than_after_rounding():
    before = canonical_program("bert")
    samples = samples_of(before, 8)
    chosen = WeightOptions("int3")
    rounded = Manager(Verifier((), mode="off")).run(before, [Quantize(chosen)])
    after = apply(before, samples, weights=chosen)
    assert output_distance(before, after, samples) < output_distance(before, rounded, samples)


def test_hessians_are_those_of_the_rounded_program():
    """The second of two linears meets what the first, rounded, gives."""
    program = captured(Wide(24), torch.randn(2, 3, 24))
    samples = [Sample([torch.randn(4, 20, 24)])]
    after = apply(program, samples, weights=WeightOptions("int2"), match_original=False)
    first, second = after.nodes(aten.linear.default)
    x = samples[0].inputs[0].reshape(-1, 24)
    bias = after.constant(first.args[2])
    hidden = torch.relu(x @ stored_values(after, first.args[1]).T + bias)
    weight = program.constant(program.nodes(aten.linear.default)[1].args[1])
    expected = compensated(weight, WeightOptions("int2"), hessian([hidden], 0.01, True), 128, True)
    assert torch.allclose(stored_values(after, second.args[1]), expected.values, atol=1e-5)


def test_padding_is_never_seen():
    program = canonical_program("bert")
    clean = bert_batch(3, 9, 0)
    dirty = {**clean, "input_ids": clean["input_ids"].clone()}
    dirty["input_ids"][clean["attention_mask"] == 0] = 90
    found = [
        apply(program, [as_sample(program, batch)], weights=WeightOptions("int3"))
        for batch in (clean, dirty)
    ]
    for path, node in by_path(found[0]).items():
        other = by_path(found[1])[path]
        assert torch.allclose(
            stored_values(found[0], node.args[1]), stored_values(found[1], other.args[1]), atol=1e-6
        )


def test_few_tokens_are_noted():
    program = canonical_program("bert")
    after = apply(program, samples_of(program, 1), weights=INT4)
    assert any("damping decides the rest" in note for note in after.history[-1].notes)


def test_every_linear_that_was_given_only_zeros_is_named():
    """An expert that no token was sent to runs on zeros."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.other = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            routed = torch.where(x > 1e3, x, 0.0)
            return torch.sigmoid(self.gate(routed)) * self.up(routed) + self.other(x)

    program = captured(Expert(), torch.randn(2, 3, 8))
    options = WeightOptions("int4")
    after = apply(program, [Sample([torch.randn(2, 30, 8)])], weights=options)
    notes = [note.partition(" was given only zeros") for note in after.history[-1].notes]
    assert [(path, bool(said)) for path, said, _ in notes] == [("gate", True), ("up", True)]
    for node in after.nodes(aten.linear.default)[:2]:
        weight = program.weight(f"{module_path(node)}.weight")
        nearest = choose_grid(weight, options).round(weight)
        assert torch.equal(stored_values(after, node.args[1]), nearest)


def test_inputs_whose_squares_overflow_are_named():
    program = captured(Wide(), torch.randn(2, 3, 8))
    with pytest.raises(CalibrationError, match=r"its input reaches 1e\+20, whose square"):
        apply(program, [Sample([torch.full((2, 3, 8), 1e20)])], weights=WeightOptions("int4"))


def test_data_that_is_not_finite_leaves_the_program_as_it_was():
    program = captured(Wide(), torch.randn(2, 3, 8))
    text = signature_of(program)
    bad = torch.randn(2, 3, 8)
    bad[0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="to NaN or infinity"):
        apply(program, [Sample([bad])], weights=WeightOptions("int4"))
    with pytest.raises(CalibrationError, match="'gptq' needs calibration data"):
        apply(program, [], weights=WeightOptions("int4"))
    unseen = Sample([torch.randn(2, 3, 8)], torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="never reached"):
        apply(program, [unseen], weights=WeightOptions("int4"))
    assert signature_of(program) == text


def test_tied_linears_are_rounded_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    program = captured(Shared(), torch.randn(2, 3, 16))
    after = apply(program, [Sample([torch.randn(4, 9, 16)])], weights=WeightOptions("int4"))
    first, second = after.nodes(aten.linear.default)
    assert first.args[1].args[0].args[0] is second.args[1].args[0].args[0]
    assert "tied to one before it" in after.history[-1].sites[1].detail


def test_sites_are_selected_and_refused_like_those_of_quantize():
    program = canonical_program("bert")
    chosen = {"include": ("encoder.*",), "exclude": ("*.intermediate.*",)}
    after = apply(program, samples_of(program), weights=INT4, **chosen)
    plain = Manager(Verifier((), mode="off")).run(program, [Quantize(INT4, **chosen)])
    assert [site.path for site in after.history[-1].sites] == [
        site.path for site in plain.history[-1].sites
    ]
    refused = {refusal.site: refusal.reason for refusal in after.history[-1].refusals}
    expected = {refusal.site: refusal.reason for refusal in plain.history[-1].refusals}
    assert refused == {site: expected[site] for site in refused}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"static_groups": False}, "act_order scatters the columns of a group"),
        ({"block_size": 0}, "must be positive"),
        ({"damping": 0.0}, "must be positive"),
    ],
)
def test_wrong_options_are_recipe_errors(wrong, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.resolve({"passes": ["canonicalize", {"gptq": wrong}]})


def test_lockstep_gives_what_the_program_gives():
    program = canonical_program("llama")
    inputs = program.examples[:2]
    lockstep = Lockstep(program, [Sample(example) for example in inputs])
    seen: dict[str, list[Tensor]] = {}

    def visit(node):
        if node.target is aten.linear.default:
            seen[node.name] = lockstep.rows(node.args[0])

    lockstep.run(visit)
    assert len(seen) == len(program.nodes(aten.linear.default))
    from fxopt.analysis.execution import run

    for index, example in enumerate(inputs):
        found: dict[str, Tensor] = {}
        run(program, example, lambda node, value: found.__setitem__(node.name, value))  # noqa: B023
        for node in program.nodes(aten.linear.default):
            expected = found[node.args[0].name]
            rows = expected.reshape(-1, expected.shape[-1])
            assert torch.allclose(seen[node.name][index], rows, atol=1e-5)
    left = [node for values in lockstep.values for node in values]
    assert len(left) < 0.2 * len(program.nodes())


@pytest.mark.parametrize("true_sequential", [True, False])
def test_what_no_rounded_linear_needs_is_neither_computed_nor_held(true_sequential):
    program = canonical_program("llama").clone()
    linears = program.nodes(aten.linear.default)
    context = Context(samples=[Sample(example) for example in program.examples[:2]])
    settings = Gptq(WeightOptions("int4"), exclude=("*lm_head",), true_sequential=true_sequential)
    rounding = _Rounding(settings, program, context)
    held: set[str] = set()

    def visit(node):
        rounding.visit(node)
        held.update(n.name for n in rounding.lockstep.values[0] if n.op == "call_function")

    rounding.lockstep.run(visit, rounding.rounded())
    head, last = linears[-1], linears[-2]
    assert [site.node for site in rounding.sites] == [node.name for node in linears[:-1]]
    assert last.args[0].name in held
    assert not held & {head.name, head.args[0].name, last.name}
    caches = program.signature.cache.split(program.graph.output_node().args[0])
    assert not {node.name for (node,) in caches} & {
        node.name for node in rounding.lockstep.values[0]
    }


def test_freed_memory_is_handed_back_while_it_runs(monkeypatch):
    """Weights of layer after layer, or what lies between the codes stays with the process."""
    released: list[int] = []
    monkeypatch.setattr(gptq, "release_freed_memory", released.append)
    monkeypatch.setattr(gptq, "_FREED", 1 << 13)
    program = canonical_program("bert")
    manager = Manager(Verifier((), mode="off"), samples=lambda: samples_of(program, 2))
    manager.run(program, [Gptq(WeightOptions("int4"))])
    linears = program.nodes(aten.linear.default)
    bytes_of_weights = sum(program.weight(str(node.args[1].target)).nbytes for node in linears)
    assert len(released) > 2
    assert min(released) >= 1 << 13
    assert bytes_of_weights - (1 << 13) < sum(released) <= bytes_of_weights


class Recurrent(nn.Module):
    """One linear that reads two inputs of unlike channels."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.gain = nn.Parameter(torch.logspace(-1.5, 1.5, width).flip(0))

    def forward(self, x):
        return self.linear(self.norm(self.linear(x)) * self.gain)


def rounded_weight(program: Program) -> Tensor:
    return stored_values(program, program.nodes(aten.linear.default)[0].args[1])


@pytest.mark.parametrize("match_original", [True, False])
@pytest.mark.parametrize("true_sequential", [True, False])
def test_a_weight_of_several_linears_is_rounded_for_all_of_them(match_original, true_sequential):
    torch.manual_seed(0)
    module = Recurrent().eval()
    x = torch.randn(3, 40, 48) * torch.logspace(-1.5, 1.5, 48)
    program, samples = captured(module, x[:1]), [Sample([part[None]]) for part in x]
    after = apply(
        program,
        samples,
        weights=WeightOptions("int3"),
        match_original=match_original,
        true_sequential=true_sequential,
    )
    weight = program.constant(program.nodes(aten.linear.default)[0].args[1])
    with torch.no_grad():
        read = [x.reshape(-1, 48), (module.norm(module.linear(x)) * module.gain).reshape(-1, 48)]
    inputs = torch.cat(read)
    expected = compensated(weight, WeightOptions("int3"), hessian([inputs], 0.01, True), 128, True)
    assert torch.allclose(rounded_weight(after), expected.values, atol=1e-6)
    errors = ((rounded_weight(after) - weight) @ inputs.T).square().sum(1)
    nearest = choose_grid(weight, WeightOptions("int3")).round(weight)
    assert bool((errors <= 1.001 * ((nearest - weight) @ inputs.T).square().sum(1)).all())
    first, second = after.history[-1].sites
    assert "output error of the 2 linears that read it" in first.detail
    assert "tied to one before it" in second.detail


def test_a_linear_that_reads_a_parameter_is_rounded_by_it():
    class Queries(nn.Module):
        """As a Perceiver: some queries are learned."""

        def __init__(self):
            super().__init__()
            self.learned = nn.Parameter(torch.randn(1, 7, 16))
            self.query, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.out(torch.relu(self.query(self.learned)) + x)

    torch.manual_seed(0)
    program, samples = captured(Queries(), torch.randn(2, 7, 16)), [Sample([torch.randn(2, 7, 16)])]
    for matched in (True, False):
        after = apply(program, samples, weights=WeightOptions("int4"), match_original=matched)
        assert [site.path for site in after.history[-1].sites] == ["query", "out"]
        learned = program.weight("learned")[0]
        weight = program.constant(program.nodes(aten.linear.default)[0].args[1])
        h = hessian([learned], 0.01, True)
        expected = compensated(weight, WeightOptions("int4"), h, 128, True)
        assert torch.equal(rounded_weight(after), expected.values)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_data_is_held_when_it_has_run(fails):
    """A run that is collected later would change the mode of gradients amid another trace."""
    torch.manual_seed(0)
    program, x = captured(Wide(), torch.randn(2, 3, 8)), torch.randn(2, 3, 8)
    gc.collect()
    known = {id(thing) for thing in gc.get_objects() if isinstance(thing, Lockstep)}
    gc.disable()
    try:
        if fails:
            with pytest.raises(CalibrationError, match="float32 holds"):
                apply(program, [Sample([1e20 * x])], weights=WeightOptions("int4"))
        else:
            apply(program, [Sample([x])], weights=WeightOptions("int4"))
        held = [thing for thing in gc.get_objects() if isinstance(thing, Lockstep)]
        assert all(id(thing) in known or not any(thing.values) for thing in held)
    finally:
        gc.enable()
