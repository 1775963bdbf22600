"""Broken passes are caught and named; correct ones are not; lossy ones are measured."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt.pipeline.measure
from fxopt.capture import capture_program
from fxopt.errors import NotEquivalentError, PassError, QualityFloorError
from fxopt.ir.program import Program, Site, module_path
from fxopt.passes.base import Context, Pass, PassResult
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.passes.quantization.quantize import ActivationOptions, Quantize, WeightOptions
from fxopt.pipeline.attribution import first_divergence
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.measure import divergence, max_error, measure, rms_error
from fxopt.pipeline.verify import Floor, Verifier
from fxopt.rewrite.builder import Builder
from tests import broken_passes
from tests.folds import RightFold
from tests.graphs import Function, capture_module
from tests.models import canonical_program, zoo_model

aten = torch.ops.aten


def manager_for(program: Program, **options) -> Manager:
    return Manager(Verifier(program.examples[:3], **options))


BROKEN = [
    (broken_passes.WrongFold(), "llama"),
    (broken_passes.WrongFold(broken_layer=3), "llama"),
    (broken_passes.OffsetIgnored(), "gemma3"),
    (broken_passes.CentredRmsNorm(), "llama"),
    (broken_passes.CentredRmsNorm(broken_layer=4), "qwen2"),
    (broken_passes.TiedWeightEdited(), "gemma3"),
    (broken_passes.SwappedHeads(), "llama"),
    (broken_passes.SwappedHeads(broken_layer=0), "mistral"),
    (broken_passes.WindowOffByOne(), "mistral"),
    (broken_passes.DroppedBias(broken_layer=2), "qwen2"),
    (broken_passes.DroppedBias(broken_layer=5), "bert"),
]


@pytest.mark.parametrize(
    ("broken", "model"), BROKEN, ids=lambda value: getattr(value, "name", value)
)
def test_a_broken_pass_is_caught_and_named(broken, model):
    program = canonical_program(model)
    places = broken.places(program.clone())
    guilty = places[broken.broken_layer]
    before = {name: value.clone() for name, value in program.weights().items()}
    history = [record.name for record in program.history]
    with pytest.raises(NotEquivalentError) as caught:
        manager_for(program).run(program, [broken])
    message = str(caught.value)
    assert repr(broken.name) in message
    assert f"Guilty site: {module_path(guilty) or '(model)'} " in message
    assert "First diverging node: " in message
    assert "before and" in message
    # Rollback: the program that went in is what it was.
    assert [record.name for record in program.history] == history
    assert all(torch.equal(before[name], value) for name, value in program.weights().items())


@pytest.mark.parametrize("mode", ["full", "fast"])
def test_both_modes_catch_a_dropped_bias(mode):
    program = canonical_program("bert")
    randomize_biases(program)
    with pytest.raises(NotEquivalentError, match="dropped-bias"):
        manager_for(program, mode=mode).run(program, [broken_passes.DroppedBias(broken_layer=2)])


def randomize_biases(program: Program) -> None:
    for name, value in program.weights().items():
        if name.endswith("bias"):
            program.set_weight(name, torch.randn_like(value))


def test_verification_can_be_switched_off():
    program = canonical_program("bert")
    result = manager_for(program, mode="off").run(
        program, [broken_passes.DroppedBias(broken_layer=2)]
    )
    assert result.history[-1].verification == {"mode": "off"}


def test_a_correct_fold_passes_although_values_in_between_change():
    program = canonical_program("llama")
    result = manager_for(program).run(program, [RightFold()])
    record = result.history[-1]
    assert len(record.sites) == 4
    assert record.verification["error_float64"] <= 1e-12
    # The program that is kept has float32 weights, each rounded once after the fold.
    assert 1e-9 < record.verification["error_own_dtype"] < 1e-5


def test_a_wrong_fold_beside_right_ones_is_the_one_named():
    @dataclasses.dataclass(frozen=True)
    class OneWrong(RightFold):
        name = "one-wrong"

        def run(self, program: Program, context: Context) -> PassResult:
            result = super().run(program, context)
            node = broken_passes.layer_norms(program)[2]
            broken_passes.scale_gain(program, node, torch.full((32,), 1.25))
            return result

    program = canonical_program("llama")
    guilty = module_path(broken_passes.layer_norms(program)[2])
    with pytest.raises(NotEquivalentError, match=f"Guilty site: {guilty} "):
        manager_for(program).run(program, [OneWrong()])


def test_canonicalize_is_verified_even_where_it_reports_no_site():
    captured = zoo_model("bert").program
    result = manager_for(captured).run(captured, [Canonicalize()])
    assert result.history[-1].verification["mode"] == "full"


def test_integers_that_become_floating_do_not_disturb_the_float64_twin():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(4)) for _ in range(2))

        def forward(self, x, mask):
            return x * self.first * self.second * (1.0 - mask)[:, None]

    @dataclasses.dataclass(frozen=True)
    class MoveScale(Pass):
        name = "move-scale"

        def run(self, program: Program, context: Context) -> PassResult:
            program.set_weight("first", program.weight("first") * 3)
            program.set_weight("second", program.weight("second") / 3)
            return PassResult((Site("", "scale"),))

    inputs = (torch.randn(3, 4), torch.tensor([0, 1, 0]))
    program = capture_module(Masked(), *inputs)
    program.examples = [list(inputs)]
    record = manager_for(program).run(program, [MoveScale()]).history[-1]
    assert record.verification["error_float64"] <= 1e-12
    assert torch.get_default_dtype() == torch.float32


def test_complex_values_are_compared_by_both_parts():
    x = torch.tensor([[0.25, 0.5]])
    before = capture_module(Function(lambda x: torch.view_as_real(torch.polar(x.exp(), x))), x)
    after = before.clone()
    [polar] = after.nodes(aten.polar.default)
    polar.args = (polar.args[0], polar.args[0])
    found = first_divergence(before, after, [x], [x], 0)
    assert found.node == polar.name
    angle, turned = x[0, 1], x[0, 1].exp()
    assert found.before == pytest.approx(float(turned * angle.cos()))
    assert found.after == pytest.approx(float(turned * turned.cos()))


def statistic(offset: float) -> Program:
    """A norm written out, and the mean of what it centred: zero over the reals, if no offset."""

    def norm(x, w):
        x = x * w
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return normed, normed.mean(-1) + offset

    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    return capture_program(Function(norm, w=torch.randn(64)), (x,))


@pytest.mark.parametrize("mode", ["full", "fast"])
def test_an_output_of_rounding_alone_may_round_otherwise(mode):
    record = manager_for(statistic(0), mode=mode).run(statistic(0), [Canonicalize()]).history[-1]
    assert record.sites


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_change_above_the_rounding_is_caught(offset):
    @dataclasses.dataclass(frozen=True)
    class Shift(Pass):
        name = "shift"

        def run(self, program: Program, context: Context) -> PassResult:
            output = program.graph.output_node()
            normed, mean = output.args[0]
            shifted = Builder(program, output, "shift").call(aten.add.Tensor, mean, 1e-6)
            output.args = ([normed, shifted],)
            return PassResult((Site("", "shifted"),))

    program = statistic(offset)
    with pytest.raises(NotEquivalentError, match="'shift'"):
        manager_for(program).run(program, [Shift()])


# --- lossy passes ---------------------------------------------------------------------------


def test_a_lossy_pass_is_measured_at_every_output_and_layer():
    program = canonical_program("llama")
    quantize = Quantize(activations=ActivationOptions())
    record = manager_for(program).run(program, [quantize]).history[-1]
    measured = record.verification
    assert 25 < measured["sqnr_db"] < 60
    assert set(measured["outputs"]) == {"logits"}
    assert 0 <= measured["kl"] < 1e-2
    assert 0.9 <= measured["top1"] <= 1
    assert set(measured["layers"]) == {site.path for site in record.sites}


@pytest.mark.parametrize(
    ("floor", "word"),
    [(Floor(sqnr_db=90), "SQNR"), (Floor(kl=1e-15), "KL"), (Floor(top1=1.01), "top-1")],
)
def test_a_floor_stops_a_lossy_pass(floor, word):
    program = canonical_program("llama")
    quantize = Quantize(activations=ActivationOptions())
    with pytest.raises(QualityFloorError, match=word) as caught:
        manager_for(program, floor=floor).run(program, [quantize])
    assert "'quantize'" in str(caught.value)
    assert all(value.dtype != torch.int8 for value in program.weights().values())


class Choices(nn.Module):
    """Returns what it makes of 50 scores."""

    def __init__(self, choose):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 50)
        self.choose = choose

    def forward(self, x):
        return self.choose(self.second(torch.relu(self.first(x))))


def choices(choose) -> Program:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    program = capture_program(Choices(choose), (x,))
    return manager_for(program).run(program, [Canonicalize()])


def test_integers_are_measured_as_agreement_and_held_to_the_floor():
    program = choices(lambda scores: scores.argmax(-1))
    coarse = Quantize(weights=WeightOptions(dtype="int4", granularity="tensor"))
    measured = manager_for(program).run(program, [coarse]).history[-1].verification
    assert 0.5 < measured["top1"] < 0.99
    with pytest.raises(QualityFloorError, match="allows: top-1 agreement"):
        manager_for(program, floor=Floor(sqnr_db=20, top1=0.99)).run(program, [coarse])
    with pytest.raises(QualityFloorError, match="no output can be measured as the floor asks"):
        manager_for(program, floor=Floor(sqnr_db=20)).run(program, [coarse])


def test_values_that_decide_on_a_shape_are_named():
    program = choices(lambda scores: scores[scores > 0])
    coarse = Quantize(weights=WeightOptions(dtype="int4", granularity="tensor"))
    with pytest.raises(QualityFloorError, match=r"values decide on the shape .* from \[\d+\] to"):
        manager_for(program).run(program, [coarse])


def test_complex_outputs_are_measured_in_decibels():
    program = choices(lambda scores: torch.view_as_complex(scores.unflatten(-1, (25, 2))))
    coarse = Quantize(weights=WeightOptions(dtype="int4", granularity="tensor"))
    measured = manager_for(program).run(program, [coarse]).history[-1].verification
    assert 10 < measured["sqnr_db"] < 30


@pytest.mark.parametrize("mode", ["full", "fast"])
@pytest.mark.parametrize(
    "choose",
    [lambda scores: scores.argmax(-1), lambda scores: torch.polar(scores.exp(), scores)],
    ids=["integers", "complex"],
)
def test_outputs_that_are_not_real_numbers_catch_a_dropped_bias(choose, mode):
    program = choices(choose)
    with pytest.raises(NotEquivalentError, match="dropped-bias"):
        manager_for(program, mode=mode).run(program, [broken_passes.DroppedBias(broken_layer=1)])


# --- measures -------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.floats(1e-6, 1e2))
def test_sqnr_is_that_of_known_noise(seed, noise):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(200, generator=generator, dtype=torch.float64)
    wrong = y + noise * y.roll(1)
    expected = noise * float(y.square().mean().sqrt() / y.square().mean().sqrt())
    assert math.isclose(rms_error(wrong, y), expected, rel_tol=1e-9)
    assert max_error(wrong, y) >= rms_error(wrong, y)


def test_measures_of_empty_integer_and_infinite_tensors():
    empty = torch.empty(0, 3)
    assert max_error(empty, empty) == rms_error(empty, empty) == 0
    assert max_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    turned = torch.polar(torch.ones(3), torch.arange(3.0))
    assert max_error(turned, turned) == 0
    assert max_error(turned, turned.conj()) == pytest.approx(2 * math.sin(2) * math.sqrt(2))
    assert max_error(turned, turned.real) == math.inf
    assert max_error(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])) == math.inf
    infinite = torch.tensor([1.0, -torch.inf])
    assert max_error(infinite, infinite) == 0


@given(st.integers(0, 1000))
def test_divergence_is_nonnegative_and_zero_for_shifted_logits(seed):
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed)).double()
    assert float(divergence(logits, logits + 3).abs().max()) < 1e-12
    assert float(divergence(logits, logits.flip(-1)).min()) >= -1e-12


def test_measure_of_a_program_against_itself_is_perfect():
    program = canonical_program("llama")
    measured = measure(program, program, program.examples[:1])
    assert measured.sqnr_db == math.inf
    assert measured.kl == 0
    assert measured.top1 == 1


def test_a_measure_some_rows_at_a_time_is_that_of_all_rows(monkeypatch):
    program = canonical_program("llama")
    quantized = manager_for(program, mode="off").apply(program, Quantize(WeightOptions("int4")))
    whole = measure(program, quantized, program.examples[1:3])
    monkeypatch.setattr(fxopt.pipeline.measure, "_SLAB_ELEMENTS", 150)  # of 99 logits each
    by_rows = measure(program, quantized, program.examples[1:3])
    assert by_rows.kl == pytest.approx(whole.kl, rel=1e-12)
    assert by_rows.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12)
    assert by_rows.top1 == whole.top1
    assert 0 < whole.kl < math.inf


def test_measures_do_not_overlook_nan_and_opposite_infinities():
    nan, infinite = torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])
    assert max_error(nan, infinite) == math.inf
    assert rms_error(infinite, -infinite) == math.inf
    program = canonical_program("llama")
    spoilt = program.clone()
    weight = spoilt.weight("lm_head.weight").clone()
    weight[0] = torch.nan
    spoilt.set_weight("lm_head.weight", weight)
    assert measure(program, spoilt, program.examples[:1]).sqnr_db == -math.inf


@torch.inference_mode()
def test_weights_made_in_inference_mode_count_no_writes():
    module = nn.Linear(4, 4)
    program = capture_program(module, (torch.randn(2, 4),))
    assert program.weight("weight").is_inference()
    after = manager_for(program).run(program, [Canonicalize()])
    assert after.history[0].name == "canonicalize"


def test_a_pass_that_writes_in_place_is_refused():
    @dataclasses.dataclass(frozen=True)
    class InPlace(Pass):
        name = "in-place"

        def run(self, program: Program, context: Context) -> PassResult:
            with torch.no_grad():
                program.weight("model.norm.weight").mul_(2)
            return PassResult((Site("model.norm", "doubled"),))

    program = canonical_program("llama")
    program.set_weight("model.norm.weight", program.weight("model.norm.weight").clone())
    with pytest.raises(PassError, match="'in-place' wrote into weight 'model.norm.weight'"):
        manager_for(program).run(program, [InPlace()])


def test_a_program_that_cannot_run_is_an_error_of_its_pass():
    @dataclasses.dataclass(frozen=True)
    class OutOfRange(Pass):
        name = "out-of-range"

        def run(self, program: Program, context: Context) -> PassResult:
            [node] = program.nodes(aten.embedding.default)
            program.set_weight(str(node.args[0].target), torch.zeros(1, 4))
            node.args[0].meta["val"] = node.args[0].meta["val"][:1]
            return PassResult((Site("", "emptied"),))

    ids = torch.tensor([[1, 2, 3]])
    program = capture_module(Function(nn.functional.embedding, w=torch.randn(9, 4)), ids)
    program.examples = [[ids]]
    with pytest.raises(PassError, match="'out-of-range' left .* IndexError"):
        manager_for(program).run(program, [OutOfRange()])


def test_a_write_that_must_stay_is_reported_with_its_reason():
    x = torch.randn(3, 4)
    program = capture_module(Function(lambda x, w: w * 2 + x, w=torch.ones(4)), x)
    program.nodes(aten.mul.Tensor)[0].target = aten.mul_.Tensor  # capture refuses such a model
    program.examples = [[x]]
    with pytest.raises(PassError, match="illegal program.*Refused: .*writes to a weight"):
        manager_for(program).run(program, [Canonicalize()])
