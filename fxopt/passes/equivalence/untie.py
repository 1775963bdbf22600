"""Give every reader of a tied weight its own copy, so that each can be changed alone.

    y = x E^T with the table E of embedding(i) = E[i]   ->   y = x U^T, U = E

Shapes: any. Bytes grow by the copies.
Exactness: bit-equal.
Source: Press and Wolf, Using the Output Embedding to Improve Language Models, EACL 2017,
    arXiv:1608.05859 (the tie that is cut).
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.ir.program import Level, Program, Site, module_path
from fxopt.passes.base import Context, Exactness, Pass, PassResult, register
from fxopt.rewrite.builder import Builder

aten = torch.ops.aten


@register("untie")
@dataclass(frozen=True)
class Untie(Pass):
    """Give linears that share a weight with another operator a copy of their own."""

    exactness = Exactness.EQUIVALENT
    input_level = Level.CANONICAL
    after = ("canonicalize",)
    before = ("fold-norm", "smoothquant", "rotate", "quantize")
    may_do_nothing = True

    def run(self, program: Program, context: Context) -> PassResult:
        """Copy each weight that a linear shares with something that is not a linear."""
        sites: list[Site] = []
        for node in [n for n in program.graph.nodes if n.op == "get_attr"]:
            linears = [user for user in node.users if _reads_as_weight(user, node)]
            if not linears or len(linears) == len(node.users):
                continue
            name = _own_name(program, str(node.target), linears[0])
            copy = program.weight(str(node.target)).detach().clone()
            own = Builder(program, linears[0], self.name).weight(name, copy)
            for linear in linears:
                linear.replace_input_with(node, own)
            sites.append(Site(module_path(linears[0]), f"{name} is a copy of {node.target}"))
        return PassResult(tuple(sites), activations={})


def _reads_as_weight(user: Node, node: Node) -> bool:
    return user.target is aten.linear.default and user.args[1] is node and user.args[0] is not node


def _own_name(program: Program, tied: str, linear: Node) -> str:
    """The name that the model itself has for the tied weight, where it has one."""
    path = module_path(linear)
    own = [
        alias
        for alias, name in program.aliases.items()
        if name == tied and alias.rpartition(".")[0] == path
    ]
    name = own[0] if own else f"{path}.untied_weight".lstrip(".")
    program.aliases.pop(name, None)
    return name
