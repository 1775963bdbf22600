"""Every number format on whole programs: what is stored, what it stands for, and what stays."""

import pytest
import torch

import fxopt
from fxopt.ir.number_formats import FORMATS
from fxopt.ir.program import module_path
from fxopt.ir.stored_codes import code_names, is_stored_weight, stored_values, stored_weights
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.passes.quantization.grid import choose_grid
from fxopt.passes.quantization.options import ActivationOptions, EmbeddingOptions, WeightOptions
from fxopt.passes.quantization.quantize import Quantize
from fxopt.pipeline.manager import Manager
from fxopt.pipeline.verify import Verifier
from tests.graphs import signature_of
from tests.models import canonical_program, zoo_model

aten = torch.ops.aten
ops = torch.ops.fxopt


def quantized(name: str, **options):
    program = canonical_program(name)
    manager = Manager(Verifier(program.examples[:1], mode="fast"))
    return program, manager.run(program, [Quantize(**options)])


@pytest.mark.parametrize("dtype", sorted(FORMATS))
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_is_stored_are_the_codes_of_the_grid(name, dtype):
    options = WeightOptions(dtype, "group", 16)
    before, after = quantized(name, weights=options)
    originals = {module_path(n): before.constant(n.args[1]) for n in linears(before)}
    assert len(originals) == len(linears(after))
    bits = FORMATS[dtype].bits
    for node in linears(after):
        weight = node.args[1]
        assert is_stored_weight(weight)
        original = originals[module_path(node)]
        expected = choose_grid(original, options).round(original)
        assert torch.equal(stored_values(after, weight), expected)
        codes = after.weight(next(code_names(weight)))
        assert codes.numel() * codes.element_size() == original.numel() * bits // 8
    assert after.history[-1].verification["sqnr_db"] > {8: 20, 4: 5, 3: 0, 2: -5}[bits]


def linears(program):
    return program.nodes(aten.linear.default)


@pytest.mark.parametrize("dtype", ["int4", "nf4", "fp8_e4m3"])
def test_canonicalizing_again_folds_no_codes(dtype):
    _, program = quantized("llama", weights=WeightOptions(dtype))
    text, count = signature_of(program), len(list(stored_weights(program)))
    again = Manager(Verifier((), mode="off")).run(program, [Canonicalize()])
    assert len(list(stored_weights(again))) == count == len(linears(program))
    assert signature_of(program) == text
    assert again.byte_count() == program.byte_count()


@pytest.mark.parametrize("dtype", ["int4", "nf4", "fp8_e4m3"])
def test_embeddings_in_groups(dtype):
    embeddings = EmbeddingOptions(dtype, "group", 8)
    before, after = quantized("gpt2", weights=None, embeddings=embeddings)
    for node in after.nodes(aten.embedding.default):
        table = node.args[0]
        assert is_stored_weight(table)
        path = module_path(node)
        old = next(n for n in before.nodes(aten.embedding.default) if module_path(n) == path)
        original = before.constant(old.args[0])
        expected = choose_grid(original, embeddings.as_weight()).round(original)
        assert torch.equal(stored_values(after, table), expected)


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_floating_activations_are_cast(dtype):
    _, after = quantized("llama", weights=None, activations=ActivationOptions(dtype))
    for node in linears(after):
        back = node.args[0]
        assert back.target is ops.dequantize.default
        assert back.args[0].meta["val"].dtype == FORMATS[dtype].storage
    assert 10 < after.history[-1].verification["sqnr_db"] < 45


def test_activations_alone_leave_stored_weights_as_they_are():
    manager = Manager(Verifier((), mode="off"))
    first = manager.run(canonical_program("llama"), [Quantize(WeightOptions("int4"))])
    tokens = Quantize(weights=None, activations=ActivationOptions("int8"))
    second = manager.run(first, [tokens])
    assert len(second.history[-1].sites) == len(linears(second))
    held = second.weights()
    assert all(held[name].data_ptr() == value.data_ptr() for name, value in first.weights().items())
    with pytest.warns(UserWarning, match="changed nothing.*its input is already rounded"):
        manager.run(second, [tokens])


@pytest.mark.parametrize("recipe", ["int4 asymmetric", "nf4", "fp8_e4m3"])
def test_saved_and_loaded_it_is_bit_equal(recipe, tmp_path):
    dtype = recipe.partition(" ")[0]
    weights = WeightOptions(dtype, "group", 16, symmetric="asym" not in recipe)
    model = zoo_model("llama").model
    recipe = ["canonicalize", Quantize(weights)]
    optimized = fxopt.optimize(model, recipe, verify="fast", progress=False)
    optimized.save_pretrained(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved")
    ids = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, optimized(input_ids=ids).logits)
    assert torch.equal(
        again.generate(ids, max_new_tokens=4, do_sample=False),
        optimized.generate(ids, max_new_tokens=4, do_sample=False),
    )
