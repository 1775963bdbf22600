"""Every op rule is proved with numbers: what it lets through changes nothing, and what it must
block it blocks."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxopt.analysis.execution import run
from fxopt.analysis.op_rules import known_operators, op_rule
from fxopt.analysis.op_rules.registry import is_by_element
from fxopt.analysis.relations import Kind, Unit
from fxopt.analysis.symmetry import Symmetries, Symmetry, symmetries
from fxopt.analysis.transform import apply, random_orders
from fxopt.errors import AnalysisError
from fxopt.ir.program import Program
from fxopt.passes.equivalence.centring import centre
from fxopt.passes.equivalence.changes import Changes
from fxopt.passes.equivalence.permutation import reorder_graph
from fxopt.pipeline.tolerances import EQUIVALENT_FLOAT64
from tests.analysis.bench import Bench, Sizes, sandwich
from tests.analysis.op_samples import SAMPLES, Sample

aten = torch.ops.aten
PROVE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=3,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
CHANNEL_KINDS = (Kind.SCALE, Kind.SIGN, Kind.PERMUTE, Kind.ROTATE, Kind.CENTRE)
QUESTIONS = [(kind, Unit.CHANNEL) for kind in CHANNEL_KINDS] + [
    (Kind.PERMUTE, Unit.HEAD),
    (Kind.PERMUTE, Unit.GROUP),
]
sizes = st.builds(
    Sizes,
    batch=st.integers(1, 3),
    length=st.integers(1, 4),
    width=st.integers(2, 7),
    heads=st.integers(2, 3),
    group=st.integers(1, 2),
    dim=st.sampled_from([4, 6]),
)


def random_transform(symmetry: Symmetry, seed: int) -> Tensor | None:
    random = torch.Generator().manual_seed(seed)
    shape = (symmetry.blocks, symmetry.size)
    if symmetry.kind is Kind.SCALE:
        return torch.randn(shape, generator=random, dtype=torch.float64).exp()
    if symmetry.kind is Kind.SIGN:
        signs = torch.randint(0, 2, shape, generator=random) * 2.0 - 1
        return torch.where(signs.prod(1, keepdim=True) > 0, -signs, signs).double()
    if symmetry.kind is Kind.ROTATE:
        square = torch.randn(*shape, symmetry.size, generator=random, dtype=torch.float64)
        rotation = torch.linalg.qr(square).Q
        if symmetry.planar:
            rotation[..., 0] *= torch.linalg.det(rotation)[..., None]
        return rotation
    return random_orders(symmetry, seed)


def changed(program: Program, symmetry: Symmetry, seed: int) -> Program:
    """A copy in which one hidden axis has another basis."""
    twin = program.clone()
    if symmetry.kind is Kind.CENTRE:
        apply(twin, symmetry)
        if any(edit.role == "operand" for edit in symmetry.edits):
            centre(twin, Changes(twin), "test")  # rms norms would show a mean
    else:
        transform = random_transform(symmetry, seed)
        apply(twin, symmetry, transform)
        if symmetry.kind is Kind.PERMUTE:
            assert transform is not None
            reorder_graph(twin, symmetry.edits, transform, "test")
    twin.graph_module.recompile()
    return twin


def outputs(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(program.graph_module(*inputs))


def assert_same(after: list[Tensor], before: list[Tensor], what: str) -> None:
    for a, b in zip(after, before, strict=True):
        assert bool(torch.isfinite(b).all()), what
        error = (a - b).abs().max() / b.square().mean().sqrt().clamp(min=1e-30)
        assert float(error) <= EQUIVALENT_FLOAT64, f"{what}: error {float(error):.3g}"


def prove(program: Program, inputs: list[Tensor], seed: int) -> dict[tuple[Kind, Unit], Symmetries]:
    """Every symmetry of every kind leaves the outputs as they are."""
    before = outputs(program, inputs)
    answers: dict[tuple[Kind, Unit], Symmetries] = {}
    for kind, unit in QUESTIONS:
        answers[kind, unit] = symmetries(program, kind, unit)
        for symmetry in answers[kind, unit]:
            after = outputs(changed(program, symmetry, seed), inputs)
            assert_same(after, before, f"{kind.value} of {symmetry}\n{program.graph}")
    return answers


def passes_through(found: Symmetries, ends: tuple[str, str], role: str | None = None) -> bool:
    first, last = ends
    if found.kind is Kind.CENTRE:  # ends at the norms, which need not subtract a mean any more
        return any(
            symmetry.weights[0].name.startswith(first)
            and any(edit.role == "operand" for edit in symmetry.edits)
            for symmetry in found
        )
    return any(
        any(edit.name.startswith(first) for edit in symmetry.weights)
        and any(edit.name.startswith(last) for edit in symmetry.weights)
        for symmetry in found
        if role is None or symmetry.role == role
    )


def passing(answers: dict[tuple[Kind, Unit], Symmetries], sample: Sample) -> set[str]:
    words = {
        kind.value
        for kind in CHANNEL_KINDS
        if passes_through(answers[kind, Unit.CHANNEL], sample.ends)
    }
    units = (Unit.HEAD, Unit.GROUP)
    if any(passes_through(answers[Kind.PERMUTE, u], sample.ends, "heads") for u in units):
        words.add("heads")
    return words & sample.judged


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
@settings(PROVE)
@given(sizes=sizes, seed=st.integers(0, 2**16))
def test_a_rule_is_right(sample, sizes, seed):
    bench = Bench(sizes, seed, positive=sample.positive)
    program = bench.finish(*sample.build(bench))
    answers = prove(program, bench.inputs, seed)
    assert passing(answers, sample) == sample.passing, str(program.graph)


def test_every_operator_of_the_table_has_a_sample():
    targets: list[Any] = [sample.target for sample in SAMPLES]
    assert [str(t) for t in known_operators() if t not in targets] == []
    for sample in SAMPLES:
        assert sample.target in known_operators(), sample


def test_the_graph_of_a_sample_holds_its_operator():
    for sample in SAMPLES:
        bench = Bench(Sizes(2, 3, 4, 2, 2, 4), 0, positive=sample.positive)
        program = bench.finish(*sample.build(bench))
        assert any(node.target is sample.target for node in program.nodes()), sample


def test_every_operator_lets_something_through():
    for target in known_operators():
        assert any(s.passing for s in SAMPLES if s.target is target), str(target)


def test_an_operator_cannot_have_two_rules():
    with pytest.raises(AnalysisError, match="aten.relu.default has two op rules; remove one"):
        op_rule(aten.relu.default)(lambda relations, node: relations.fixed(1))


def check_place_by_place(node: Node, values: dict[Node, Any]) -> None:
    """Another value at the first place of an operand moves nothing at the others."""
    result = values[node]
    tensors = [n for n in node.all_input_nodes if isinstance(values[n], Tensor)]
    for operand in tensors:
        for axis in range(-min(values[operand].dim(), result.dim()), 0):
            size = result.shape[axis]
            if values[operand].shape[axis] != size or size == 1:
                continue
            other = values[operand].clone()
            other.select(axis, 0).copy_(values[operand].select(axis, 1))
            seen = {**values, operand: other}
            args, kwargs = map_arg((node.args, node.kwargs), seen.__getitem__)
            moved = node.target(*args, **kwargs)
            rest = (axis, 1, size - 1)
            assert torch.equal(moved.narrow(*rest), result.narrow(*rest)), f"{node} on {axis}"


@pytest.mark.parametrize("sample", [s for s in SAMPLES if is_by_element(s.target)], ids=str)
def test_what_is_marked_by_element_reads_its_own_place_only(sample):
    bench = Bench(Sizes(2, 3, 4, 2, 2, 4), 0, positive=sample.positive)
    program = bench.finish(*sample.build(bench))
    values: dict[Node, Any] = {}
    run(program, bench.inputs, values.__setitem__)
    for node in program.nodes(sample.target):
        check_place_by_place(node, values)


def test_rules_of_other_kinds_are_not_marked():
    others = (aten.softmax.int, aten.linear.default, aten.unsqueeze.default, aten.sum.dim_IntList)
    assert not any(is_by_element(target) for target in (*others, aten.cumsum.default))


@settings(PROVE)
@given(sizes=sizes, seed=st.integers(0, 2**16))
def test_an_operator_without_a_rule_blocks_and_is_named(sizes, seed):
    bench = Bench(sizes, seed)
    op = sandwich(lambda g, x: g.call(aten.cumsum.default, x, 1))
    answers = prove(bench.finish(*op(bench)), bench.inputs, seed)
    for found in answers.values():
        assert not passes_through(found, ("before", "after"))
        assert any("aten.cumsum.default has no op rule" in r.reason for r in found.refusals)
