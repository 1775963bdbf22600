import json
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import RecipeError
from fxopt.ir.program import Level
from fxopt.passes import base
from fxopt.passes.base import Pass, PassResult, register
from fxopt.pipeline.options import known_passes
from fxopt.pipeline.recipe import Recipe


@dataclass(frozen=True)
class Weights:
    dtype: Literal["int8", "int4"] = "int8"
    granularity: Literal["channel", "tensor", "group"] = "channel"
    group_size: int | None = None
    symmetric: bool = True


@pytest.fixture(autouse=True)
def fakes():
    """Two passes of the shape of `canonicalize` and `quantize`, known only to one test."""
    known_passes()  # discovery first, so that it does not run while the table is exchanged
    saved = dict(base._REGISTRY)
    base._REGISTRY.clear()

    @register("raise")
    @dataclass(frozen=True)
    class Raise(Pass):
        """Raise to canonical operators."""

        output_level: ClassVar[Level | None] = Level.CANONICAL
        before: ClassVar[tuple[str, ...]] = ("smooth",)

        def run(self, program, context):
            return PassResult()

    @register("smooth")
    @dataclass(frozen=True)
    class Smooth(Pass):
        """Smooth."""

        alpha: float = 0.5
        input_level: ClassVar[Level] = Level.CANONICAL
        before: ClassVar[tuple[str, ...]] = ("shrink",)

    @register("shrink")
    @dataclass(frozen=True)
    class Shrink(Pass):
        """Shrink weights."""

        weights: Weights = Weights()
        activations: Weights | None = None
        include: list[str] = field(default_factory=lambda: ["*"])
        axes: tuple[int, ...] = ()
        input_level: ClassVar[Level] = Level.CANONICAL
        output_level: ClassVar[Level | None] = Level.QUANTIZED

        def __post_init__(self):
            if self.weights.granularity == "group" and self.weights.group_size is None:
                raise ValueError("group granularity needs a group_size")

    yield {"raise": Raise, "smooth": Smooth, "shrink": Shrink}
    base._REGISTRY.clear()
    base._REGISTRY.update(saved)


def problems(value) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.resolve(value)
    return str(caught.value)


def test_a_mapping_becomes_passes(fakes):
    recipe = Recipe.resolve(
        {
            "passes": [
                "raise",
                {"smooth": {"alpha": 1}},
                {"shrink": {"weights": {"dtype": "int4"}, "include": ["a.*"], "axes": [1, 2]}},
            ]
        }
    )
    raised, smooth, shrink = recipe.build()
    assert raised == fakes["raise"]()
    assert smooth.alpha == 1.0
    assert shrink.weights == Weights(dtype="int4")
    assert shrink.include == ["a.*"]
    assert shrink.axes == (1, 2)


def test_every_kind_of_value_resolves(fakes, tmp_path):
    text = "fxopt: 1\npasses: [raise, {shrink: {weights: {dtype: int4}}}]\n"
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "mine.json").write_text(json.dumps(yaml.safe_load(text)))
    wanted = [fakes["raise"](), fakes["shrink"](weights=Weights(dtype="int4"))]
    by_path = Recipe.resolve(tmp_path / "mine.yaml")
    values = [
        by_path,
        str(tmp_path / "mine.json"),
        yaml.safe_load(text),
        wanted,
        ["raise", wanted[1]],
        ("raise", {"shrink": {"weights": {"dtype": "int4"}}}),
    ]
    assert all(Recipe.resolve(value).build() == wanted for value in values)
    assert by_path.name == "mine"


def test_yaml_round_trip():
    recipe = Recipe.resolve(
        {
            "name": "x",
            "passes": ["raise", {"shrink": {}}],
            "floor": {"sqnr_db": 20},
            "expect": {"shrink": {"min_sites": 3}},
            "lowering": {"shapes": [[1, 5]]},
        }
    )
    assert Recipe.resolve(yaml.safe_load(recipe.to_yaml())) == recipe
    assert Recipe.resolve(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_recipe_is_frozen():
    recipe = Recipe.resolve(["raise"])
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        ({"passes": ["raize"]}, ["passes[0]", "no pass called 'raize'", "'raise'?"]),
        ({"passes": ["raise"], "flor": {}}, ["flor: unknown key", "'floor'?"]),
        ({"passes": ["raise"], "floor": {"sqnr": 3}}, ["floor.sqnr", "'sqnr_db'?"]),
        ({"passes": ["raise"], "verify": "fulll"}, ["verify", "'full'?"]),
        ({"passes": ["raise"], "lowering": {"speed_gate": "yes"}}, ["lowering.speed_gate", "bool"]),
        ({"passes": ["raise"], "lowering": {"shapes": [[1, 0]]}}, ["lowering.shapes[0][1]"]),
        ({"passes": ["raise"], "calibration": {"samples": 2.5}}, ["calibration.samples", "2.5"]),
        ({"passes": ["raise"], "floor": {"top1": 2}}, ["floor.top1"]),
        ({"passes": ["raise"], "floor": {"sqnr_db": float("nan")}}, ["floor.sqnr_db"]),
        ({"passes": ["raise"], "fxopt": 2}, ["fxopt: recipe format 2 is newer", "Upgrade"]),
        ({"passes": ["raise"], "fxopt": 0}, ["no recipe format 0"]),
        ({"passes": ["raise"], "fxopt": "1"}, ["fxopt", "'1'"]),
        ({"passes": []}, ["passes", "empty"]),
        ({}, ["passes: this key is required"]),
        ({"passes": "raise"}, ["passes", "'raise'"]),
        ({"passes": [3]}, ["passes[0]", "found 3"]),
        ({"passes": [{"raise": {}, "shrink": {}}]}, ["passes[0]", "one name"]),
        ({"passes": ["raise", {"raise": [1]}]}, ["passes[1]"]),
        ({"passes": [{"raise": {"x": 1}}]}, ["passes[0].raise.x: unknown key", "nothing"]),
        (
            {"passes": ["raise", {"shrink": {"wieghts": {}}}]},
            ["passes[1].shrink.wieghts: unknown key", "'weights'?"],
        ),
        (
            {"passes": ["raise", {"shrink": {"weights": {"dtyp": "int8"}}}]},
            ["passes[1].shrink.weights.dtyp", "'dtype'?"],
        ),
        (
            {"passes": ["raise", {"shrink": {"weights": {"dtype": "int9"}}}]},
            ["passes[1].shrink.weights.dtype: 'int9' is not one of", "'int8'?"],
        ),
        (
            {"passes": ["raise", {"shrink": {"activations": {"symmetric": 1}}}]},
            ["passes[1].shrink.activations.symmetric"],
        ),
        (
            {"passes": ["raise", {"shrink": {"weights": {"granularity": "group"}}}]},
            ["passes[1].shrink", "needs a group_size"],
        ),
        ({"passes": ["raise", {"shrink": {"include": {1, 2}}}]}, ["passes[1].shrink", "plain"]),
        ({"passes": ["shrink"]}, ["passes[0].shrink", "needs a canonical", "Put raise before"]),
        ({"passes": ["raise", "shrink", "smooth"]}, ["passes[2].smooth", "before shrink"]),
        ({"passes": ["raise", "shrink", "raise"]}, ["passes[2].raise", "too late", "repeats"]),
        ({"passes": ["raise", "smooth", "smooth"]}, ["passes[2].smooth", "repeats passes[1]"]),
        (
            {"passes": ["raise", "shrink"], "expect": {"shrnk": {"min_sites": 1}}},
            ["expect.shrnk", "'shrink'?"],
        ),
        ({"passes": ["raise"], "expect": {"raise": {"min_sites": -1}}}, ["expect.raise.min_sites"]),
        (None, ["not nothing"]),
        (3, ["not a int"]),
    ],
)
def test_problems_are_named_with_their_place(data, messages):
    text = problems(data)
    assert all(message in text for message in messages), text


def test_all_problems_come_in_one_error():
    text = problems(
        {
            "fxopt": 7,
            "verfy": "off",
            "passes": ["raize", {"shrink": {"weights": {"dtype": "int9", "x": 1}}}],
            "floor": {"sqnr_db": "high"},
        }
    )
    places = [line.split(":")[0].removeprefix("  - ") for line in text.splitlines()[1:]]
    assert "6 problems" in text
    assert set(places) == {
        "fxopt",
        "verfy",
        "floor.sqnr_db",
        "passes[0]",
        "passes[1].shrink.weights.dtype",
        "passes[1].shrink.weights.x",
    }


def test_direct_construction_raises_the_same_error():
    with pytest.raises(RecipeError, match="no pass called"):
        Recipe(passes=("nothing",))


def test_the_same_pass_twice_with_other_options_is_allowed():
    recipe = Recipe.resolve(
        ["raise", {"shrink": {"include": ["a"]}}, {"shrink": {"include": ["b"]}}]
    )
    assert len(recipe.build()) == 3


def test_an_unregistered_pass_is_refused():
    @dataclass(frozen=True)
    class Mine(Pass):
        """Mine."""

    assert "not registered" in problems([Mine()])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.yaml", None, "no recipe file"),
        ("bad.yaml", "passes: [raise", "not valid YAML"),
        ("bad.json", "{'passes': ", "not valid YAML"),
        ("list.yaml", "- raise", "holds a list"),
        ("empty.yaml", "", "holds nothing"),
        ("tag.yaml", "!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert message in problems(str(path))


def test_unreadable_files(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    assert "cannot be read" in problems(str(tmp_path / "latin.yaml"))
    assert "cannot be read" in problems(tmp_path)


def test_unknown_presets_name_the_nearest():
    assert "'w8a8-dynamic'?" in problems("w8a8-dinamic")
    assert "canonical" in problems("zzz")


def test_the_schema_knows_the_options():
    schema = Recipe.json_schema()
    names, *with_options = schema["properties"]["passes"]["items"]["anyOf"]
    assert names == {"enum": ["raise", "shrink", "smooth"]}
    shrink = next(option for option in with_options if "shrink" in option["properties"])
    assert shrink["description"] == "Shrink weights."
    assert shrink["additionalProperties"] is False
    text = json.dumps(schema)
    assert '"int4"' in text
    for reference in [part.split('"')[0] for part in text.split('"#/$defs/')[1:]]:
        assert reference in schema["$defs"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=12,
    )
)
def test_no_data_raises_anything_else(data):
    try:
        Recipe.resolve(data)
    except RecipeError:
        return
    assert isinstance(data, dict | list | str)


@given(
    st.dictionaries(
        st.sampled_from(["weights", "include", "axes", "activations"]),
        st.recursive(
            st.none() | st.integers() | st.text(),
            lambda x: st.lists(x) | st.dictionaries(st.text(), x),
            max_leaves=6,
        ),
    )
)
def test_no_options_raise_anything_else(options):
    try:
        built = Recipe.resolve(["raise", {"shrink": options}]).build()
    except RecipeError as error:
        place = str(error)
    else:
        place = f"passes[1].{built[1].name}"
    assert "passes[1].shrink" in place
