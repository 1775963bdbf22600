"""slice-channels: what is cut, that sizes follow, that zero channels are cut exactly, refusals."""

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.analysis.execution import run_float64
from fxopt.analysis.promotion import promote_program
from fxopt.analysis.relations import Kind, Unit
from fxopt.analysis.symmetry import symmetries
from fxopt.errors import CalibrationError, RecipeError
from fxopt.ir.program import Program
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.passes.equivalence.importance import importance_of
from fxopt.passes.equivalence.slice_channels import SliceChannels
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.measure import max_error
from fxopt.pipeline.state_basis import fitted
from fxopt.pipeline.verify import Verifier
from tests.models import canonical_program, optimize_zoo, zoo_model
from tests.random_transformers import build, choices, inputs

aten = torch.ops.aten
HIDDEN, HEADS, GROUPS = (Unit.CHANNEL, "hidden"), (Unit.HEAD, "heads"), (Unit.GROUP, "heads")
MODELS = ["llama", "gpt2", "bert", "gemma3", "phi3", "gptneox", "mixtral", "falcon", "t5", "bloom"]


def sliced(program: Program, mode="fast", **options) -> Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model may have no site
        manager = Manager(Verifier(program.examples, mode=mode))
        return manager.run(program, [SliceChannels(**options)])


def refusals(program: Program) -> str:
    return "; ".join(r.reason for r in program.history[-1].refusals)


def bytes_of(program: Program, unit: Unit, role: str, fraction: float) -> int:
    """What the weights lose: per edit, the removed coordinates times what lies behind each."""
    total = 0
    for symmetry in symmetries(program, Kind.SLICE, unit).of_role(role):
        removed = math.floor(symmetry.size * fraction + 1e-9) * symmetry.blocks
        for edit in symmetry.weights:
            weight = program.weight(edit.name)
            behind = weight.numel() // math.prod(weight.shape[axis] for axis in edit.axes)
            total += removed * edit.positions.shape[2] * behind * weight.element_size()
    return total


# --- sites, sizes, bytes --------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("options", "axis"),
    [({"hidden": 0.25}, HIDDEN), ({"heads": 0.5}, HEADS), ({"groups": 0.5}, GROUPS)],
    ids=["hidden", "heads", "groups"],
)
def test_bytes_fall_by_exactly_what_was_cut(name, options, axis):
    before = canonical_program(name)
    expected = bytes_of(before, *axis, next(iter(options.values())))
    after = sliced(before, **options)
    record = after.history[-1]
    found = symmetries(before, Kind.SLICE, axis[0]).of_role(axis[1])
    assert len(record.sites) == len([s for s in found if s.size > 1])
    assert before.byte_count() - after.byte_count() == expected
    assert (expected > 0) == bool(record.sites)
    if record.sites:
        assert record.verification["sqnr_db"] is not None


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3", "gptneox", "mixtral"])
def test_the_residual_stream_is_cut_everywhere(name):
    before = canonical_program(name)
    after = sliced(before, residual=0.25)
    assert len(after.history[-1].sites) == 1
    assert "8 of 32 residual coordinates" in after.history[-1].sites[0].detail
    norms = after.nodes(aten.rms_norm.default, aten.layer_norm.default)
    assert {node.args[1][0] for node in norms if node.args[1][0] in (24, 32)} == {24}
    assert before.byte_count() - after.byte_count() == bytes_of(
        before, Unit.CHANNEL, "residual", 0.25
    )


def test_all_at_once_and_a_program_that_is_cut_is_cut_again():
    program = sliced(canonical_program("llama"), hidden=0.25, heads=0.5, residual=0.25)
    assert len(program.history[-1].sites) == 2 + 2 + 1
    weights = program.weights()
    assert weights["model.layers.0.mlp.gate_proj.weight"].shape == (48, 24)
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (16, 24)
    again = sliced(program, hidden=0.5)
    assert again.weight("model.layers.0.mlp.gate_proj.weight").shape == (24, 24)


def test_caches_follow_their_heads():
    program = sliced(canonical_program("gpt2"), heads=0.5)
    shapes = {s.name: s.shape for s in (*program.signature.inputs, *program.signature.outputs)}
    assert shapes["past_key_0"][1] == shapes["present_value_1"][1] == 2
    assert all(values[-1].shape[1] == 2 for values in program.examples)
    old = canonical_program("gpt2")
    assert all(v.shape[1] == 2 for v in fitted(program, old.examples[-1])[-4:])
    assert "caches made by the original no longer fit" in program.history[-1].notes[0]


def test_counts_are_rounded_up_to_a_multiple():
    program = sliced(canonical_program("llama"), hidden=0.3, multiple_of=16)
    assert program.weight("model.layers.0.mlp.gate_proj.weight").shape == (48, 32)
    whole = sliced(canonical_program("llama"), hidden=0.1, multiple_of=64)
    assert whole.history[-1].sites == ()
    assert "a multiple of 64, all of it stays" in refusals(whole)
    heads = sliced(canonical_program("bert"), heads=0.5, multiple_of=24)  # 8 channels a head
    assert heads.weight("encoder.layer.0.attention.self.query.weight").shape == (24, 32)


def test_nothing_asked_for_is_nothing_done():
    before = canonical_program("llama")
    after = sliced(before)
    assert after.history[-1].sites == after.history[-1].refusals == ()
    assert after.history[-1].verification == {"mode": "nothing changed"}


# --- what is left ---------------------------------------------------------------------------


def test_the_smallest_are_removed_and_the_rest_keeps_its_values():
    before = canonical_program("llama")
    found = symmetries(before, Kind.SLICE).of_role("hidden")
    after = sliced(before, hidden=0.25)
    for symmetry in found:
        kept = importance_of(before, symmetry, None)[0].topk(48).indices.sort().values
        for edit in symmetry.weights:
            old, new = before.weight(edit.name), after.weight(edit.name)
            assert torch.equal(new, old.index_select(edit.axes[0], kept))


def test_importance_by_activation_follows_what_linears_read():
    text = {"input_ids": torch.randint(3, 90, (2, 12))}
    by_weight = optimize_zoo("llama", recipe({"hidden": 0.5}))
    by_activation = optimize_zoo(
        "llama", recipe({"hidden": 0.5, "importance": "activation"}), calibration=[text]
    )
    name = "model.layers.0.mlp.down_proj.weight"
    a, b = by_weight.program.weight(name), by_activation.program.weight(name)
    assert a.shape == b.shape == (32, 32)
    assert not torch.equal(a, b)


def zero_out(program: Program, unit: Unit, role: str) -> None:
    """Make the last coordinate or two of every block of a role zero in all weights."""
    for symmetry in symmetries(program, Kind.SLICE, unit).of_role(role):
        for edit in symmetry.weights:
            axes = list(range(len(edit.axes)))
            weight = program.weight(edit.name).clone()
            flat = weight.movedim(edit.axes, axes).flatten(0, len(axes) - 1).clone()
            flat[torch.from_numpy(edit.positions[:, -1].copy()).flatten()] = 0
            sizes = [weight.shape[axis] for axis in edit.axes]
            program.set_weight(edit.name, flat.unflatten(0, sizes).movedim(axes, edit.axes))


def assert_zeros_are_cut_exactly(program: Program, axis, name) -> bool:
    zero_out(program, *axis)
    found = symmetries(program, Kind.SLICE, axis[0]).of_role(axis[1])
    smallest = max((s.size for s in found), default=2)
    after = sliced(program, mode="off", **{name: 1 / smallest})
    for values in program.examples[:2]:
        expected = run_float64(program, values)
        cut = fitted(after, values)
        for a, b in zip(run_float64(after, cut), expected, strict=True):
            if a.shape == b.shape:  # else it is a cache
                assert max_error(a, b) <= 1e-12
    return bool(after.history[-1].sites)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("axis", "option"),
    [(HIDDEN, "hidden"), (HEADS, "heads"), (GROUPS, "groups")],
    ids=["hidden", "heads", "groups"],
)
def test_zero_channels_are_removed_exactly(name, axis, option):
    program = promote_program(canonical_program(name), 1 << 30)
    assert assert_zeros_are_cut_exactly(program, axis, option) or name == "falcon"


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(choice=choices(), seed=st.integers(0, 1000), part=st.sampled_from(["hidden", "heads"]))
def test_zero_channels_of_random_transformers_are_removed_exactly(choice, seed, part):
    model = build(choice, seed).double()
    example = tuple(t.double() if t.is_floating_point() else t for t in inputs(choice, seed, 2, 5))
    program = Manager(Verifier((), mode="off")).run(fxopt.capture(model, example), [Canonicalize()])
    axis = HIDDEN if part == "hidden" else HEADS
    done = assert_zeros_are_cut_exactly(program, axis, part)
    if part == "hidden":
        assert done


# --- the whole way --------------------------------------------------------------------------


def recipe(options):
    lowering = {"target": "reference", "speed_gate": False}
    return {"passes": ["canonicalize", {"slice-channels": options}], "lowering": lowering}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_sliced_model_generates_saves_and_loads(name, tmp_path):
    options = {"hidden": 0.25, "heads": 0.5, "residual": 0.25}
    optimized = optimize_zoo(name, recipe(options))
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokens = optimized.generate(ids, **settings)
    assert torch.equal(tokens, optimized.generate(ids, use_cache=False, **settings))
    optimized.save_pretrained(tmp_path / "sliced")
    loaded = fxopt.load(tmp_path / "sliced")
    assert torch.equal(loaded.generate(ids, **settings), tokens)
    with pytest.raises(fxopt.FxoptError, match="'slice-channels' did more"):
        optimized.state_dict_for(zoo_model(name).model)


def test_a_sliced_model_is_quantized():
    chosen = recipe({"hidden": 0.25, "heads": 0.5})
    chosen["passes"] += [{"quantize": {}}]
    optimized = optimize_zoo("gpt2", chosen)
    assert len(optimized.program.history[-1].sites) > 0


# --- refusals -------------------------------------------------------------------------------


def test_a_stream_that_is_an_output_stays():
    after = sliced(canonical_program("bert"), residual=0.25)
    assert after.history[-1].sites == ()
    assert "it is the model's output 'last_hidden_state'" in refusals(after)


class NormedHidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.norm(torch.relu(self.up(x))))


class SoftmaxHidden(NormedHidden):
    def forward(self, x):
        return self.down(torch.softmax(self.up(x), -1))


class OneOfThem(NormedHidden):
    def forward(self, x):
        h = self.up(x)
        return self.down(h) + h[..., -1:]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (NormedHidden, "layer_norm measures all of the axis together"),
        (SoftmaxHidden, "softmax looks at all of the axis together"),
    ],
)
def test_what_looks_at_the_whole_axis_refuses(module, reason):
    program = fxopt.capture(module().eval(), (torch.randn(3, 8),))
    program = Manager(Verifier(program.examples, mode="off")).run(program, [Canonicalize()])
    after = sliced(program, hidden=0.5)
    assert after.history[-1].sites == ()
    assert reason in refusals(after)


def test_a_coordinate_that_is_read_alone_stays_and_its_bounds_follow():
    program = fxopt.capture(OneOfThem().eval(), (torch.randn(3, 8),))
    program = Manager(Verifier(program.examples, mode="off")).run(program, [Canonicalize()])
    after = sliced(program, hidden=0.5)
    assert "7 of 15 hidden coordinates removed" in after.history[-1].sites[0].detail
    assert after.weight("up.bias").shape == (9,)
    assert after.weight("up.bias")[-1] == program.weight("up.bias")[-1]
    bounds = [node.args[2:4] for node in after.nodes(aten.slice.Tensor)]
    assert bounds == [(8, 9)]


def test_wrong_options_and_missing_calibration():
    with pytest.raises(RecipeError, match="heads 1 is not a fraction"):
        SliceChannels(heads=1)
    with pytest.raises(RecipeError, match="multiple_of 0"):
        SliceChannels(multiple_of=0)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        sliced(canonical_program("llama"), hidden=0.5, importance="activation")


def test_an_axis_that_no_linear_reads_has_no_activation():
    text = {"input_ids": torch.randint(3, 90, (2, 12))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimized = optimize_zoo(
            "mixtral", recipe({"hidden": 0.5, "importance": "activation"}), calibration=[text]
        )
    assert "no linear was seen to read it" in refusals(optimized.program)
