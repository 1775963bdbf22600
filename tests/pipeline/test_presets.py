import pytest

from fxopt.errors import RecipeError
from fxopt.pipeline.recipe import Recipe, presets


@pytest.mark.parametrize(
    "name", ["canonical", "w8a8-dynamic", "w8a8-static", "w8a16", "kv8", "kivi4", "kivi2"]
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


@pytest.mark.parametrize(("name", "dtype"), [("kv8", "int8"), ("kivi4", "int4"), ("kivi2", "int2")])
def test_cache_presets_leave_the_weights_alone(name, dtype):
    _, quantize_cache = presets()[name].build()
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
def test_four_bit_presets_round_in_groups_of_64_and_leave_the_head(name, passes):
    built = presets()[name].build()[1:]
    assert [item.name for item in built] == passes
    for item in built:
        options = item.options()
        if options["weights"] is not None:
            assert (options["weights"]["dtype"], options["weights"]["group_size"]) == ("int4", 64)
        assert item.name == "awq-scale" or options["exclude"] == ("lm_head",)


@pytest.mark.parametrize("name", ["smoothquant", "awq-scale", "rotate", "equalize", "permute-ffn"])
@pytest.mark.parametrize("rounding", ["quantize", "gptq"])
def test_what_runs_before_quantize_runs_before_every_pass_that_rounds(name, rounding):
    with pytest.raises(RecipeError, match=f"{name} must run before {rounding}; exchange them"):
        Recipe.resolve(["canonicalize", rounding, name])
    Recipe.resolve(["canonicalize", name, rounding])
