"""The picture of what a symmetry couples."""

from fxopt.analysis.picture import coupling_graph, mermaid
from fxopt.analysis.relations import Kind
from fxopt.analysis.symmetry import symmetries
from tests.models import canonical_program


def test_the_value_axis_of_one_layer():
    program = canonical_program("llama")
    value = symmetries(program, Kind.SCALE).of_role("value")[0]
    graph = coupling_graph(program, value)
    weights = {n: f["inverse"] for n, f in graph.nodes(data=True) if f["kind"] == "weight"}
    assert weights == {
        "model.layers.0.self_attn.v_proj.weight": False,
        "model.layers.0.self_attn.o_proj.weight": True,
    }
    labels = [facts["label"] for _, facts in graph.nodes(data=True)]
    assert "fxopt.attention.default" in labels
    assert "past_value_0" in labels
    drawn = mermaid(graph)
    assert drawn.startswith("flowchart LR")
    assert '{{"model.layers.0.self_attn.o_proj.weight"}}' in drawn
    assert drawn.count("---") == graph.number_of_edges()
