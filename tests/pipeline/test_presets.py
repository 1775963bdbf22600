import pytest
import torch
import transformers as hf

import fxopt
from fxopt.errors import ExpectationError, RecipeError
from fxopt.ir.stored_codes import is_stored_weight
from fxopt.passes.equivalence.rotate import Rotate
from fxopt.passes.quantization.options import ActivationOptions, WeightOptions
from fxopt.pipeline.recipe import Recipe, presets
from tests.models import optimize_zoo

aten = torch.ops.aten
FEW_BITS = ["w4a16-nf4", "w3-gobo"]


@pytest.mark.parametrize(
    "name",
    [
        "canonical",
        "w8a8-dynamic",
        "w8a8-static",
        "w8a16",
        "zeroquant",
        "kv8",
        "kv8-fp8",
        "kivi4",
        "kivi2",
        *FEW_BITS,
    ],
)
def test_presets_build(name):
    recipe = presets()[name]
    assert recipe.name == name
    assert recipe.description
    assert recipe == Recipe.resolve(name)
    built = recipe.build()
    assert built[0].name == "canonicalize"


@pytest.mark.parametrize(
    ("name", "granularity"), [("w8a8-dynamic", "token"), ("w8a8-static", "tensor"), ("w8a16", None)]
)
def test_quantized_presets_say_what_their_name_says(name, granularity):
    quantize = presets()[name].build()[1]
    options = quantize.options()
    assert options["weights"]["dtype"] == "int8"
    embeddings = {"dtype": "int8", "granularity": "channel", "group_size": None}
    assert options["embeddings"] == embeddings
    if granularity is None:
        assert options["activations"] is None
    else:
        assert options["activations"]["granularity"] == granularity


def test_zeroquant_is_in_groups_of_rows_and_the_rest_per_channel():
    _, first, rest = presets()["zeroquant"].build()
    assert first.weights == WeightOptions(granularity="block", block_size=(16, -1))
    assert (first.embeddings, first.exclude) == (None, ("lm_head",))
    assert rest.weights == rest.embeddings.as_weight() == WeightOptions("int8", "channel")
    assert first.activations == rest.activations == ActivationOptions(symmetric=False)
    assert first.needs() == rest.needs() == ()


@pytest.mark.parametrize("model", ["bert", "llama", "gemma3"])
def test_zeroquant_leaves_no_linear_in_floating_point(model):
    optimized = optimize_zoo(model, "zeroquant", target="reference")
    for node in optimized.program.nodes(aten.linear.default):
        assert is_stored_weight(node.args[1])
        assert node.args[0].target is torch.ops.fxopt.dequantize.default
    details = {site.detail for record in optimized.report.history for site in record.sites}
    assert "int8 weight per group of 16 rows, int8 activation per token" in details


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("kv8", "int8"), ("kv8-fp8", "fp8_e4m3"), ("kivi4", "int4"), ("kivi2", "int2")],
)
def test_cache_presets_leave_the_weights_alone(name, dtype):
    _, *rotated, quantize_cache = presets()[name].build()
    keys = Rotate(residual=False, values=False, online=False, keys=True)
    assert rotated == [keys] * (dtype == "fp8_e4m3")
    options = quantize_cache.options()
    assert (options["dtype"], options["group"], options["window"]) == (dtype, 32, 128)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("w4a16", ["quantize"]),
        ("w4a16-gptq", ["gptq"]),
        ("w4a16-awq", ["awq-scale", "quantize"]),
        ("w4a8-gptq", ["gptq", "quantize"]),
    ],
)
def test_four_bit_presets_round_in_groups_of_64_and_the_rest_in_int8(name, passes):
    *built, rest = presets()[name].build()[1:]
    assert [item.name for item in built] == passes
    assert rest.weights == rest.embeddings.as_weight() == WeightOptions("int8", "channel")
    for item in built:
        options = item.options()
        if options["weights"] is not None:
            assert (options["weights"]["dtype"], options["weights"]["group_size"]) == ("int4", 64)
        assert item.name == "awq-scale" or options["exclude"] == ("lm_head",)


@pytest.mark.parametrize("name", ["smoothquant", "awq-scale", "rotate", "equalize", "permute-ffn"])
@pytest.mark.parametrize("rounding", ["quantize", "gptq", "gobo", "llm-int8"])
def test_what_runs_before_quantize_runs_before_every_pass_that_rounds(name, rounding):
    with pytest.raises(RecipeError, match=f"{name} must run before {rounding}; exchange them"):
        Recipe.resolve(["canonicalize", rounding, name])
    Recipe.resolve(["canonicalize", name, rounding])


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("w8a8-llm-int8", ["llm-int8", "quantize"]),
        ("w8a8-static-peg", ["peg", "quantize", "quantize"]),
        ("w8a8-static-mixed", ["quantize", "mixed-precision"]),
        ("w4a16-qbert", ["gptq", "quantize"]),
    ],
)
def test_presets_of_methods_store_every_linear_and_the_embeddings(name, passes):
    assert [item.name for item in presets()[name].build()[1:]] == passes
    torch.manual_seed(0)
    data = [{"input_ids": torch.randint(99, (4, 9))} for _ in range(4)]
    # 6 groups need a width that they divide.
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6}
    model = hf.BertModel(hf.BertConfig(**sizes, num_hidden_layers=1, vocab_size=99)).eval()
    program = fxopt.optimize(model, name, calibration=data, progress=False).program
    for target, place in ((aten.linear.default, 1), (aten.embedding.default, 0)):
        found = program.nodes(target)
        assert found
        assert all(is_stored_weight(node.args[place]) for node in found)


def test_the_bias_corrected_preset_gives_every_rounded_linear_a_new_bias():
    _, first, rest = presets()["w4a16-bias-corrected"].build()
    assert (first.weights.group_size, first.weights.range) == (64, "output")
    assert first.bias_correction
    assert not rest.bias_correction
    data = [{"input_ids": torch.randint(99, (20, 9))} for _ in range(2)]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**sizes, num_hidden_layers=1, vocab_size=99)).eval()
    options = {"calibration": data, "progress": False, "target": "reference"}
    optimized = fxopt.optimize(model, "w4a16-bias-corrected", **options)
    before, program = dict(model.named_parameters()), optimized.program
    linears = program.nodes(aten.linear.default)
    assert len(linears) == 7
    for node in linears:
        assert is_stored_weight(node.args[1])
        bias = program.weight(str(node.args[2].target))
        assert not torch.equal(bias, before[f"{node.meta['module_path']}.bias"])


@pytest.mark.parametrize("width", [32, 48])
def test_static_peg_stores_a_tied_table_once(width):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 96, "num_attention_heads": 4}
    config = hf.LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99, tie_word_embeddings=True)
    data = [{"input_ids": torch.randint(99, (4, 9))} for _ in range(4)]
    model = hf.LlamaForCausalLM(config).eval()
    program = fxopt.optimize(
        model, "w8a8-static-peg", calibration=data, target="reference", progress=False
    ).program
    tables = [name for name, value in program.weights().items() if list(value.shape) == [99, width]]
    assert len(tables) == 1


def test_groups_of_peg_are_those_that_quantize_gives_a_scale():
    peg, quantize, rest = presets()["w8a8-static-peg"].build()[1:]
    assert rest.activations == ActivationOptions(granularity="tensor", symmetric=False)
    assert peg.groups == quantize.activations.groups == 6
    assert quantize.activations.granularity == "embedding_group"


@pytest.mark.parametrize("width", [32, 48])
def test_where_groups_of_peg_do_not_divide_a_linear_it_has_one_scale(width):
    """6 divides 48 and not 32; the feed-forward's 96 it divides in both."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 96, "num_attention_heads": 4}
    model = hf.BertModel(hf.BertConfig(**sizes, num_hidden_layers=1, vocab_size=99)).eval()
    data = [{"input_ids": torch.randint(99, (4, 9))} for _ in range(4)]
    optimized = fxopt.optimize(model, "w8a8-static-peg", calibration=data, progress=False)
    linears = optimized.program.nodes(aten.linear.default)
    assert all(is_stored_weight(node.args[1]) for node in linears)
    _, grouped, single = (
        [site for site in record.sites if "activation" in site.detail]
        for record in optimized.report.history[1:]
    )
    assert len(grouped) == (len(linears) if width == 48 else 1)
    assert len(grouped) + len(single) == len(linears)


def test_the_rotated_preset_with_gptq_rounds_weights_and_activations_to_four_bits():
    *_, gptq, rest = presets()["w4a4-rotated-gptq"].build()
    assert gptq.weights == WeightOptions("int4", "channel", range="output")
    assert rest.weights is None
    assert rest.activations == ActivationOptions("int4", "token")
    rotations = [item for item in presets()["w4a4-rotated"].build() if item.name == "rotate"]
    assert [
        item for item in presets()["w4a4-rotated-gptq"].build() if item.name == "rotate"
    ] == rotations
    optimized = optimize_zoo(
        "llama",
        "w4a4-rotated-gptq",
        target="reference",
        calibration=[{"input_ids": torch.randint(99, (4, 9))}],
    )
    linears = optimized.program.nodes(aten.linear.default)
    assert sum(is_stored_weight(node.args[1]) for node in linears) == len(linears) - 1


def test_nf4_is_in_groups_of_64_and_the_rest_in_int8():
    _, first, rest = presets()["w4a16-nf4"].build()
    weights = first.options()["weights"]
    assert (weights["dtype"], weights["granularity"], weights["group_size"]) == ("nf4", "group", 64)
    assert (first.activations, first.embeddings, first.exclude) == (None, None, ("lm_head",))
    # Alike, so that a tied head and embedding stay one tensor.
    assert rest.weights == rest.embeddings.as_weight() == WeightOptions("int8", "channel")
    assert first.needs() == rest.needs() == ()


def test_gobo_is_in_three_bits_with_head_and_embeddings_in_four():
    _, first, rest = presets()["w3-gobo"].build()
    assert (first.bits, first.threshold, first.embeddings) == (3, -4.0, False)
    assert (rest.bits, rest.threshold, rest.embeddings) == (4, -4.0, True)
    assert first.exclude == ("lm_head",)
    assert first.needs() == rest.needs() == ()


@pytest.mark.parametrize("name", ["mixed-hawq", "mixed-accuracy"])
def test_mixed_presets_choose_among_four_and_eight_bits(name):
    _, allocate, *rest = presets()[name].build()
    four, eight, *floating = allocate.choices
    assert (four.weights.dtype, four.weights.group_size, eight.weights.dtype) == (
        "int4",
        64,
        "int8",
    )
    assert len(floating) == (name == "mixed-accuracy")
    # The last one stores head and embeddings alike, so that a tied table stays one tensor.
    assert rest[-1].weights == rest[-1].embeddings.as_weight() == WeightOptions("int8", "channel")


@pytest.mark.parametrize("model", ["bert", "llama", "gemma3"])
@pytest.mark.parametrize(
    ("name", "share"), [("w4a16", 0.35), ("w4a16-nf4", 0.35), ("w3-gobo", 0.2)]
)
def test_presets_of_few_bits_leave_no_large_weight_in_floating_point(name, share, model):
    optimized = optimize_zoo(model, name, target="reference")
    assert optimized.report.bytes_after < share * optimized.report.bytes_before
    program = optimized.program
    for target, index in ((aten.linear.default, 1), (aten.embedding.default, 0)):
        assert all(is_stored_weight(node.args[index]) for node in program.nodes(target))


QUANTIZED_IN_TWO = [
    "canonicalize",
    {"quantize": {"weights": {"dtype": "int4", "granularity": "group", "group_size": 16}}},
    {"quantize": {"embeddings": {"dtype": "int8", "granularity": "channel"}}},
]


class _Plain(torch.nn.Module):
    """A linear and no table: the second `quantize` finds nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 8)

    def forward(self, x):
        return self.up(x)


@pytest.mark.parametrize("width", [16, 12])
def test_passes_of_one_name_meet_what_is_expected_together(width, recwarn):
    """Of width 12 the groups fit nowhere, and the second pass takes the linear."""
    recipe = {"passes": QUANTIZED_IN_TWO, "expect": {"quantize": {"min_sites": 1}}}
    options = {"example_inputs": (torch.randn(2, width),), "target": "reference"}
    optimized = fxopt.optimize(_Plain(width), recipe, progress=False, **options)
    assert sum(len(r.sites) for r in optimized.report.history if r.name == "quantize") == 1
    said = [str(w.message) for w in recwarn if "changed nothing" in str(w.message)]
    assert len(said) == (width == 12)


def test_what_none_of_them_meets_fails():
    recipe = {"passes": QUANTIZED_IN_TWO, "expect": {"quantize": {"min_sites": 2}}}
    with pytest.raises(ExpectationError, match="1 sites, at least 2"):
        fxopt.optimize(_Plain(16), recipe, example_inputs=(torch.randn(2, 16),), progress=False)
