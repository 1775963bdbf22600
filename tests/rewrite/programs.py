"""Small graphs built node by node, for tests of the rewriting machinery itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxopt.ir.inference import fake_mode
from fxopt.ir.program import Program, WeightTree
from fxopt.ir.signature import Signature
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten


def program_of(function: Callable[..., Any], *inputs: Tensor) -> Program:
    """A program built by `function(build, *input nodes)`, which returns the output node."""
    graph = torch.fx.Graph()
    program = Program(GraphModule(WeightTree(), graph), Signature((), (), {}, {}))
    mode = fake_mode(program)
    nodes: list[Node] = []
    for index, tensor in enumerate(inputs):
        node = graph.placeholder(f"x{index}")
        node.meta = {"val": mode.from_tensor(tensor), "module_path": "", "from_node": []}
        nodes.append(node)
    output = graph.output(())
    output.meta = {"module_path": "model.layer", "from_node": []}
    result = function(Builder(program, output, "test"), *nodes)
    output.args = (tuple(result) if isinstance(result, list | tuple) else (result,),)
    program.graph_module.recompile()
    return program
