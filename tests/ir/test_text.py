import pytest
import torch

from fxopt.ir.text import format_program
from tests.tiny import small_program, tiny_program


def test_the_whole_form_of_a_small_program():
    program = small_program({"layer.weight": torch.ones(3), "other": torch.ones(2)})
    program.aliases["tied"] = "other"
    assert format_program(program, weights=True) == (
        "program at level CAPTURED\n"
        "  takes   %x: f32[3]\n"
        "  returns x: f32[3]\n"
        "\n"
        '%0 = aten.add.Tensor(%x, "layer.weight")  # layer\n'
        "return [%0]\n"
        "\n"
        "weights\n"
        '  "layer.weight": f32[3]\n'
        '  "other": f32[2]\n'
        '  "tied" = "other"\n'
    )


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_names_of_nodes_do_not_matter(kind):
    program = tiny_program(kind)
    other = program.clone()
    for index, node in enumerate(reversed(list(other.graph.nodes))):
        if node.op == "call_function":
            node._rename(f"renamed_{index}")
    assert format_program(program, weights=True) == format_program(other, weights=True)


def test_sizes_carry_the_names_of_the_signature():
    text = format_program(tiny_program("llama"))
    assert "%input_ids: i64[batch, sequence]" in text
    assert ": f32[batch, sequence, 32]  # model.embed_tokens" in text
    assert '"model.embed_tokens.weight"' in text
    assert ": past + sequence" in text
    body = text.partition("\n\n")[2]
    assert not [line for line in body.splitlines() if "s0" in line or "s27" in line]


def test_without_types_and_without_recorded_shapes():
    program = tiny_program("bert")
    untyped = format_program(program, types=False)
    assert ": f32" not in untyped.partition("\n\n")[2]
    for node in program.graph.nodes:
        node.meta.pop("val", None)
    assert format_program(program) == untyped


def test_results_that_are_lists_and_arguments_of_every_kind():
    import operator

    def build(graph, x, constants):
        options = {"dtype": torch.bfloat16, "layout": torch.strided}
        device = torch.device("cpu")
        made = graph.call_function(torch.ops.aten.zeros.default, ([3],), {**options})
        made.meta["val"] = [torch.empty(3), torch.empty(2, dtype=torch.int8)]
        graph.call_function(torch.ops.aten.to.device, (x, device, torch.float16))
        graph.call_function(operator.getitem, (x, (slice(None, 2), None)))
        graph.call_function(torch.sym_max, (1, 2.5))
        graph.call_function(max, (1, True))
        return graph.call_function(torch.ops.aten.gelu.default, (x,), {"approximate": "tanh"})

    lines = format_program(small_program(build=build)).splitlines()[4:]
    assert lines == [
        "%0 = aten.zeros.default([3], dtype=bf16, layout=torch.strided) : (f32[3], i8[2])",
        "%1 = aten.to.device(%x, cpu, f16)",
        "%2 = operator.getitem(%x, (:2, None))",
        "%3 = torch.sym_max(1, 2.5)",
        "%4 = max(1, True)",
        "%5 = aten.gelu.default(%x, approximate='tanh')  # layer",
        "return [%5]",
    ]
