import html.parser
import json

import pytest
import torch

from fxopt.ir.diff import diff
from fxopt.ir.program import Level
from fxopt.rewrite.builder import Builder
from tests.tiny import small_program, tiny_program

aten = torch.ops.aten


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_equal_programs_have_no_difference(kind):
    program = tiny_program(kind)
    found = diff(program, program.clone())
    assert not found
    assert str(found) == "no difference"
    assert found.to_dict()["modules"] == {}
    assert "no difference" in found.to_html()


def test_names_and_nan_do_not_matter():
    weights = {"w": torch.tensor([1.0, float("nan"), 2.0])}
    a, b = small_program(weights), small_program({"w": weights["w"].clone()})
    for node in b.nodes():
        node._rename("other_name")
    assert not diff(a, b)


def test_operators_are_counted_by_module():
    before = tiny_program("bert")
    after = before.clone()
    gelu = after.nodes(aten.gelu.default)[0]
    silu = Builder(after, gelu, "test").call(aten.silu.default, gelu.args[0])
    gelu.replace_all_uses_with(silu)
    after.graph.erase_node(gelu)
    found = diff(before, after)
    assert list(found.modules) == ["encoder.layer.0.intermediate.intermediate_act_fn"]
    (module,) = found.modules.values()
    assert module.removed == {"aten.gelu.default": 1}
    assert module.added == {"aten.silu.default": 1}
    assert not module.changed
    assert not found.weights
    assert str(found).splitlines()[:3] == [
        "encoder.layer.0.intermediate.intermediate_act_fn",
        "  - aten.gelu.default",
        "  + aten.silu.default",
    ]


def test_changed_arguments_are_seen():
    before = tiny_program("bert")
    after = before.clone()
    norm = after.nodes(aten.layer_norm.default)[0]
    norm.args = (*norm.args[:4], 0.5)
    (module,) = diff(before, after).modules.values()
    assert module.changed == {"aten.layer_norm.default": 1}
    assert "~ aten.layer_norm.default" in str(diff(before, after))


def test_other_wiring_is_seen():
    before = tiny_program("bert")
    after = before.clone()
    add = after.nodes(aten.add.Tensor)[-1]
    add.args = (add.args[1], add.args[0])
    found = diff(before, after)
    assert found
    assert "connected or ordered differently" in str(found)


def test_weights_and_bytes():
    before = small_program(
        {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4), "e": torch.ones(2)}
    )
    after = small_program(
        {
            "a": torch.ones(4, dtype=torch.int8),
            "b": torch.tensor([1.0, 1.0, 1.25, 1.0]),
            "d": torch.ones(2, 2),
            "e": torch.ones(2),
        }
    )
    found = diff(before, after)
    assert {name: str(weight) for name, weight in found.weights.items()} == {
        "a": "f32[4] -> i8[4], 16 -> 4 bytes",
        "b": "f32[4], values changed by at most 0.25",
        "c": "removed (f32[4], 16 bytes)",
        "d": "new f32[2, 2], 16 bytes",
    }
    assert (found.bytes_before, found.bytes_after) == (56, 44)
    assert str(found).endswith("56 -> 44 bytes (0.786x)")
    data = json.loads(json.dumps(found.to_dict()))
    assert data["weights"]["b"]["largest_change"] == 0.25


def test_level_and_interface():
    before, after = small_program(), small_program(dtype=torch.float16)
    after.level = Level.QUANTIZED
    assert diff(before, after).interface == (
        "level CAPTURED -> QUANTIZED",
        "input x: f32[3] -> f16[3]",
        "output x: f32[3] -> f16[3]",
    )


class Balanced(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_balanced_and_escaped():
    after = small_program({"<b>": torch.ones(3)})
    fragment = diff(small_program(), after).to_html()
    parser = Balanced()
    parser.feed(fragment)
    assert not parser.open
    assert "<b>" not in fragment
    assert "<b>" in parser.text
