"""Run a graph as one Python function over local variables.

`GraphModule` reads each weight through a chain of `nn.Module.__getattr__` calls, several
microseconds a weight; at one token a step that is as long as the arithmetic. Here weights are
arguments of the generated function.
"""

from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxopt.ir.program import iterate_weights


class Runner(nn.Module):
    """Calls a graph with its weights bound; takes and returns what the graph does."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self._bind(module)

    def _bind(self, module: GraphModule) -> None:
        graph = Graph()
        copies: dict[Node, Node] = {}
        held = dict(iterate_weights(module))
        weights: list[Tensor] = []
        for node in module.graph.nodes:
            if node.op == "get_attr":
                copies[node] = graph.placeholder(node.name)
                weights.append(held[str(node.target)])
        for node in module.graph.nodes:
            if node.op != "get_attr":
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        self._weights = tuple(weights)
        # Kept out of the module tree: its parameters are those of the program.
        object.__setattr__(self, "_function", GraphModule(nn.Module(), graph).forward)

    def forward(self, *inputs: Tensor) -> Any:
        """The graph's outputs."""
        return self._function(*self._weights, *inputs)  # type: ignore[operator]
