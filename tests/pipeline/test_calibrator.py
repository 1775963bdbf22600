"""Calibration data is read once for a recipe: what passes change channel by channel is carried."""

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from fxopt.analysis.calibration import collect, linear_inputs
from fxopt.analysis.observers import Histogram
from fxopt.analysis.samples import Sample
from fxopt.ir.program import Program
from fxopt.passes.base import Calibration, Context, Exactness, Pass, PassResult
from fxopt.passes.equivalence.awq_scale import AwqScale
from fxopt.passes.equivalence.equalize import Equalize
from fxopt.passes.equivalence.fold_norm import FoldNorm
from fxopt.passes.equivalence.permute_ffn import PermuteFfn
from fxopt.passes.equivalence.permute_heads import PermuteHeads
from fxopt.passes.equivalence.permute_residual import PermuteResidual
from fxopt.passes.equivalence.permute_vo import PermuteVo
from fxopt.passes.equivalence.rotate import Rotate
from fxopt.passes.equivalence.slice_channels import SliceChannels
from fxopt.passes.equivalence.smoothquant import SmoothQuant
from fxopt.passes.equivalence.untie import Untie
from fxopt.passes.quantization.gptq import Gptq
from fxopt.passes.quantization.options import ActivationOptions, WeightOptions
from fxopt.passes.quantization.peg import Peg
from fxopt.passes.quantization.quantize import Quantize
from fxopt.pipeline import calibrator
from fxopt.pipeline.calibrator import Calibrator
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from tests.passes.equivalence.harness import calibration_of, canonical, plain

STATIC = ActivationOptions(granularity="tensor", symmetric=False)
PERCENTILE = ActivationOptions(granularity="tensor", observer="percentile")
AVERAGE = ActivationOptions(granularity="tensor", observer="moving_average")


class Needs(Pass):
    """Stands for a later pass that needs everything that there is."""

    name = "needs"
    exactness = Exactness.APPROXIMATE

    def needs(self) -> tuple[Calibration, ...]:
        kinds = ("minimum", "maximum", "mean", "mean_abs", "tokens", "batches", "histogram")
        return (*map(Calibration, kinds), Calibration("rows", 10_000))

    def observed(self, program):
        return linear_inputs(program)


def carried_over(
    program: Program, a_pass: Pass, samples: Sequence[Sample]
) -> tuple[Program, Calibrator]:
    """A program after a pass, and what is known of it from data read before the pass."""
    later = [Needs()]
    known = Calibrator(lambda: samples, lambda name, detail: None)
    known.prepare(program, later[0], later, samples)
    working = program.clone()
    taker = Calibrator(lambda: samples, lambda name, detail: None)
    statistics = taker.prepare(program, a_pass, (), samples).statistics
    recorder = known.recorder(program, a_pass, later, samples)
    result = a_pass.run(working, Context(statistics, samples, recorder=recorder))
    working.graph_module.recompile()
    known.follow(working, result, recorder, later)
    return working, known


def judge(program: Program, known: Calibrator, samples: Sequence[Sample], tolerance: float) -> None:
    """All that is said to be known is what reading the data again finds."""
    fresh = collect(program, linear_inputs(program), samples, rows=10_000, histogram=True)
    for kind, names in known.known.covered.items():
        mine = known.known.statistics[kind]
        assert set(mine) == names & set(fresh[kind])
        for name, value in mine.items():
            theirs = fresh[kind][name]
            if isinstance(value, Histogram):
                assert int(value.counts.sum()) == int(theirs.counts.sum())
                pairs = [(value.low, theirs.low), (value.high, theirs.high)]
                value, theirs = (torch.tensor(ends) for ends in zip(*pairs, strict=True))
            size = float(theirs.double().abs().max()) or 1.0
            assert float((value.double() - theirs.double()).abs().max()) <= tolerance * size, kind


def all_inputs(program: Program) -> set[str]:
    return {node.name for node in linear_inputs(program)}


@pytest.mark.parametrize("model", ["llama", "phi3", "gpt2", "bert", "mixtral", "tied-llama", "t5"])
@pytest.mark.parametrize(
    "a_pass",
    [
        SmoothQuant(),
        SmoothQuant(alpha=0.3, fold=False),
        AwqScale(ratio=0.5),
        Equalize(),
        PermuteFfn(by="random"),
        PermuteVo(by="random"),
        PermuteHeads(by="random"),
        PermuteResidual(by="random"),
        FoldNorm(bias=False),
        Peg(groups=4),
        Untie(),
        Rotate(residual=False, values=False, online=False, keys=True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_carried_over_a_pass_is_what_reading_again_finds(model, a_pass):
    before = canonical(model)
    samples = calibration_of(before)
    after, known = carried_over(before, a_pass, samples)
    judge(after, known, samples, tolerance=1e-4)
    for kind in ("minimum", "maximum", "mean", "mean_abs", "rows", "tokens"):
        assert known.known.covered[kind] == all_inputs(after), kind


def test_what_a_rotation_mixes_is_not_known_any_more():
    before = canonical("llama")
    samples = calibration_of(before)
    ready, _ = carried_over(before, FoldNorm(), samples)
    after, known = carried_over(ready, Rotate(online=False), samples)
    judge(after, known, samples, tolerance=1e-4)
    left = known.known.covered["minimum"]
    downs = {
        n.args[0].name
        for n in after.nodes(torch.ops.aten.linear.default)
        if "down_proj" in n.meta["module_path"]
    }
    assert left == downs  # the stream and the values are turned


def test_removed_channels_leave_nothing_known():
    before = canonical("llama")
    after, known = carried_over(before, SliceChannels(hidden=0.5), calibration_of(before))
    assert known.known.covered == {}
    assert all_inputs(after) == all_inputs(before)


def test_a_scale_of_channels_leaves_no_histogram_and_an_order_does():
    before = canonical("llama")
    samples = calibration_of(before)
    scaled = carried_over(before, SmoothQuant(fold=False), samples)[1].known
    assert scaled.covered["histogram"] == scaled.covered["batches"] == set()
    ordered = carried_over(before, Peg(groups=4), samples)[1].known
    assert ordered.covered["histogram"] == ordered.covered["minimum"]


class Counted:
    """A Manager that counts how often a program is run over the data for statistics."""

    def __init__(self, monkeypatch) -> None:
        self.runs = 0
        original = calibrator.record

        def counting(*args):
            self.runs += 1
            original(*args)

        monkeypatch.setattr(calibrator, "record", counting)

    def run(self, program: Program, *passes: Pass) -> Program:
        samples = calibration_of(program)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            manager = Manager(Verifier((), mode="off"), samples=lambda: samples)
            return manager.run(program, passes)


@pytest.mark.parametrize(
    ("passes", "runs"),
    [
        ([SmoothQuant(alpha="auto"), Quantize(activations=STATIC)], 1),
        ([AwqScale(), Quantize(WeightOptions("int4", "group", 16, range="output"))], 1),
        ([Peg(4), Quantize(activations=STATIC, exclude=("*q_proj",)),
          Quantize(activations=STATIC)], 1),
        # A histogram of all channels does not say what a scale for each makes of it.
        ([SmoothQuant(), Quantize(activations=PERCENTILE)], 2),
        ([SmoothQuant(), Quantize(activations=AVERAGE)], 2),
        ([PermuteFfn(by="random"), Quantize(activations=PERCENTILE)], 1),
        # gptq reads the data by itself and records on its way what follows it.
        ([Gptq(), Quantize(None, STATIC)], 0),
        ([SmoothQuant(), Gptq(), Quantize(None, PERCENTILE)], 1),
        ([SliceChannels(hidden=0.5, importance="activation"), Quantize(activations=STATIC)], 2),
    ],
)  # fmt: skip
def test_how_often_the_data_is_read_for_statistics(monkeypatch, passes, runs):
    counted = Counted(monkeypatch)
    counted.run(canonical("llama"), *passes)
    assert counted.runs == runs


def test_the_record_says_how_each_pass_came_by_its_statistics(monkeypatch):
    after = Counted(monkeypatch).run(
        canonical("llama"), SmoothQuant(), Quantize(activations=STATIC, exclude=("*q_proj",)),
        Quantize(),
    )  # fmt: skip
    assert [r.calibration for r in after.history[-3:]] == ["read", "carried over", ""]


@pytest.mark.parametrize("true_sequential", [True, False])
def test_what_gptq_records_is_what_the_rounded_program_gives(true_sequential):
    """Not true-sequential, inputs are those of the original model; so is what is recorded."""
    before = canonical("llama")
    samples = calibration_of(before)
    a_pass = Gptq(WeightOptions("int4", "group", 16), true_sequential=true_sequential)
    after, known = carried_over(before, a_pass, samples)
    judged = after if true_sequential else before
    judge(judged, known, samples, tolerance=1e-4)
    assert known.known.covered["histogram"] == all_inputs(after)


def test_static_ranges_behind_gptq_are_those_of_reading_again(monkeypatch):
    program = canonical("llama")
    once = Counted(monkeypatch).run(program, Gptq(), Quantize(None, STATIC))
    middle = Counted(monkeypatch).run(program, Gptq())
    twice = Counted(monkeypatch).run(middle, Quantize(None, STATIC))
    weights = twice.weights()
    assert set(once.weights()) == set(weights)
    for name, value in once.weights().items():
        assert torch.allclose(value.double(), weights[name].double(), rtol=1e-5), name


class _Shared(nn.Module):
    """One activation that two linears read, one of them behind a product with an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, y):
        return self.first(x).relu(), self.second(x * y)


def test_an_activation_that_the_data_decides_is_known_as_it_was():
    program = plain(_Shared(), torch.randn(3, 8), torch.randn(3, 8))
    samples = calibration_of(program)
    after, known = carried_over(program, Equalize(), samples)
    judge(after, known, samples, tolerance=1e-5)
    assert known.known.covered["minimum"] == all_inputs(after)


def test_a_pass_that_says_nothing_is_believed_to_have_changed_everything(monkeypatch):
    class Silent(Pass):
        """Says nothing of activations."""

        exactness = Exactness.EQUIVALENT
        name = "silent"
        may_do_nothing = True

        def run(self, program, context):
            return PassResult()

    counted = Counted(monkeypatch)
    counted.run(canonical("llama"), SmoothQuant(), Silent(), Quantize(activations=STATIC))
    assert counted.runs == 2


def test_one_end_of_a_range_is_carried_without_the_other_being_asked_for():
    class Lowest(Needs):
        """Needs the least of each channel alone."""

        def needs(self) -> tuple[Calibration, ...]:
            return (Calibration("minimum"),)

    before = canonical("llama")
    samples = calibration_of(before)
    known = Calibrator(lambda: samples, lambda name, detail: None)
    known.prepare(before, Lowest(), [Lowest()], samples)
    program = before
    for a_pass in (PermuteFfn(by="random"), Equalize()):
        program = program.clone()
        known.follow(program, a_pass.run(program, Context()), None, [Lowest()])
        program.graph_module.recompile()
    judge(program, known, samples, tolerance=1e-4)
    assert known.known.covered["minimum"] == all_inputs(program)
