"""Tiny models with random weights, captured once per test run, and saved folders of them."""

from functools import cache

import torch
import transformers as hf
from torch.fx import Graph, GraphModule

from fxopt.capture.pretrained import capture_pretrained
from fxopt.ir.program import Program, WeightTree, assign_weight
from fxopt.ir.signature import Signature, TensorSpec
from fxopt.runtime.folder import write_folder

aten = torch.ops.aten

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(kind: str) -> hf.PreTrainedModel:
    """A Llama with a cache, a BERT, or a T5."""
    torch.manual_seed(0)
    if kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, num_key_value_heads=2))
    elif kind == "bert":
        model = hf.BertModel(hf.BertConfig(**_SIZES))
    else:
        model = hf.T5ForConditionalGeneration(
            hf.T5Config(
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                vocab_size=99,
                pad_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=0,
            )
        )
    return model.eval()


@cache
def _captured(kind: str) -> Program:
    return capture_pretrained(tiny_model(kind), None)


def tiny_program(kind: str) -> Program:
    """A captured tiny model; each caller has its own copy of the graph."""
    return _captured(kind).clone()


def save(path, program, **changes):
    contents = {
        "config": {"model_type": "tiny"},
        "generation_config": None,
        "recipe": {"fxopt": 1, "name": "none", "passes": []},
        "report": {"bytes": 3},
        "extra": {"class": "Tiny", "list": [1, 2.5, None]},
    }
    write_folder(path, program, **{**contents, **changes})


def small_program(weights=None, build=None, dtype=torch.float32) -> Program:
    """`x + w` on three numbers, or whatever `build(graph, x, constants)` makes."""
    weights = weights or {"layer.weight": torch.tensor([1.0, 2.0, 3.0])}
    graph, root = Graph(), WeightTree()
    constants = []
    for name, tensor in weights.items():
        assign_weight(root, name, tensor)
        constants.append(graph.get_attr(name))
    x = graph.placeholder("x")
    result = build(graph, x, constants) if build else None
    if result is None:
        result = graph.call_function(aten.add.Tensor, (x, constants[0]))
    result.meta["module_path"] = "layer"
    result.meta["from_node"] = [{"node": "linear", "pass": "raise/Rule"}]
    graph.output([result])
    spec = TensorSpec("x", (3,), dtype)
    structure = {"kind": "tensor", "index": 0}
    signature = Signature((spec,), (spec,), structure, structure)
    return Program(GraphModule(root, graph), signature)
