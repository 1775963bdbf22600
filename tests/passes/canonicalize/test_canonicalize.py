"""The whole pass on tiny models: what is raised, and that nothing else changes."""

import pytest
import torch

from fxopt.ir.legality import check_program
from fxopt.ir.program import Level, Program
from fxopt.passes.base import Context, registered_passes
from fxopt.passes.canonicalize.canonicalize import RAISED, Canonicalize, describe
from tests.graphs import capture_module, count, relative_error, run, run_float64, signature_of
from tests.models import zoo_model
from tests.passes.canonicalize.rules import canonical
from tests.zoo import BLOCKS

LAYERS = 2
# rms_norm, layer_norm, rope, attention, linear, gelu and silu together; two layers each.
EXPECTED = {
    "llama": (2 * LAYERS + 1, 0, 2 * LAYERS, LAYERS, 7 * LAYERS + 1, LAYERS),
    "gemma2": (4 * LAYERS + 1, 0, 2 * LAYERS, LAYERS, 7 * LAYERS + 1, LAYERS),
    "cohere": (0, LAYERS + 1, 2 * LAYERS, LAYERS, 7 * LAYERS + 1, LAYERS),
    "glm": (2 * LAYERS + 1, 0, 2 * LAYERS, LAYERS, 6 * LAYERS + 1, LAYERS),
    "gptneox": (0, 2 * LAYERS + 1, 2 * LAYERS, LAYERS, 4 * LAYERS + 1, LAYERS),
    "gptj": (0, LAYERS + 1, 2 * LAYERS, LAYERS, 6 * LAYERS + 1, LAYERS),
    "gpt2": (0, 2 * LAYERS + 1, 0, LAYERS, 4 * LAYERS + 1, LAYERS),
    "bloom": (0, 2 * LAYERS + 2, 0, LAYERS, 4 * LAYERS + 1, LAYERS),
    "falcon": (0, LAYERS + 1, 2 * LAYERS, LAYERS, 4 * LAYERS + 1, LAYERS),
    "mixtral": (2 * LAYERS + 1, 0, 2 * LAYERS, LAYERS, 5 * LAYERS + 1, 0),
    "t5": (5 * LAYERS + 2, 0, 0, 3 * LAYERS, 16 * LAYERS + 1, 0),
    "bert": (0, 2 * LAYERS + 1, 0, LAYERS, 6 * LAYERS + 1, LAYERS),
}


def zoo_program(name: str) -> Program:
    return zoo_model(name).program


def counts(program: Program) -> tuple[int, ...]:
    *first, gelu, silu = (count(program, target) for target in RAISED.values())
    return (*first, gelu + silu)


@pytest.mark.parametrize("name", EXPECTED)
def test_zoo(name: str):
    before = zoo_program(name)
    program = before.clone()
    result = Canonicalize().run(program, Context())
    assert counts(program) == EXPECTED[name], describe(program)
    assert result.refusals == ()
    assert result.notes[0] == describe(program)
    assert len(program.graph.nodes) < len(before.graph.nodes)
    program.level = Level.CANONICAL
    check_program(program)
    for tensors in before.examples[:3]:
        assert relative_error(run(program, tensors), run(before, tensors)) <= 1e-5
        assert relative_error(run_float64(program, tensors), run_float64(before, tensors)) <= 1e-9
    after = signature_of(program)
    assert Canonicalize().run(program, Context()).sites == ()
    assert signature_of(program) == after


def test_sites_name_the_module_and_what_was_raised():
    program = zoo_program("llama").clone()
    result = Canonicalize().run(program, Context())
    kinds = [site.detail for site in result.sites]
    assert kinds.count("rms_norm") == 2 * LAYERS + 1
    assert kinds.count("rope") == 2 * LAYERS
    assert set(kinds) == {"rms_norm", "rope"}  # linear and attention came raised from capture
    paths = {site.path for site in result.sites if site.detail == "rms_norm"}
    assert "model.layers.1.post_attention_layernorm" in paths


def test_conv1d_weights_keep_their_names():
    program = zoo_program("gpt2").clone()
    stored = program.weight("transformer.h.0.attn.c_attn.weight").clone()
    Canonicalize().run(program, Context())
    assert program.layouts["transformer.h.0.attn.c_attn.weight"] == "transposed"
    assert len(program.layouts) == 4 * LAYERS
    weight = program.weight("transformer.h.0.attn.c_attn.weight")
    assert torch.equal(weight, stored.t())
    assert torch.equal(zoo_program("gpt2").weight("transformer.h.0.attn.c_attn.weight"), stored)


def test_weights_are_neither_copied_nor_lost():
    for name in ("llama", "bloom", "gptj"):
        program = zoo_program(name).clone()
        before = program.weights()
        Canonicalize().run(program, Context())
        made = {key for key in program.weights() if key not in before}
        assert all(key.startswith("constants.") for key in made)
        lost = {key for key in before if key not in program.weights()}
        assert all("lifted_tensor" in key for key in lost)
        assert program.byte_count() <= sum(t.nbytes for t in before.values()) + 4096


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str):
    torch.manual_seed(0)
    make, inputs = BLOCKS[name]
    program = capture_module(make().eval(), *inputs())
    result = canonical(program, [torch.randn(3, 7, 32)])
    assert result.refusals == ()
    layers = 2 if "encoder" in name else 1
    kinds = dict(zip(RAISED, (count(program, target) for target in RAISED.values()), strict=True))
    assert kinds["attention"] == layers
    if name.startswith("decoder"):
        expected = {"rms_norm": 2, "rope": 2, "attention": 1, "linear": 6, "gelu": 1}
        assert {kind: number for kind, number in kinds.items() if number} == expected
        [node] = program.nodes(torch.ops.fxopt.attention.default)
        assert node.args[1].meta["val"].shape[1] == 2  # grouped keys


def test_it_is_registered_with_its_contract():
    assert registered_passes()["canonicalize"] is Canonicalize
    assert Canonicalize.input_level is Level.CAPTURED
    assert Canonicalize.output_level is Level.CANONICAL
    assert Canonicalize.may_do_nothing
