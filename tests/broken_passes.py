"""Passes that claim to be equivalences and are not: each repeats a mistake that shipped somewhere.

Every pass visits the same kind of place in each layer, does the right thing (nothing, or a
correct edit) in all of them and the wrong thing in one, `broken_layer`. A verifier must name the
pass and that place.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.ir.program import Program, Site, module_path
from fxopt.passes.base import Context, Exactness, Pass, PassResult
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import argument

aten = torch.ops.aten
ops = torch.ops.fxopt


@dataclass(frozen=True)
class BrokenPass(Pass):
    """Base: visits sites in order and breaks one of them."""

    broken_layer: int = 1

    exactness = Exactness.EQUIVALENT

    def run(self, program: Program, context: Context) -> PassResult:
        sites = []
        for index, node in enumerate(self.places(program)):
            if index == self.broken_layer:
                self.spoil(program, node)
            sites.append(Site(module_path(node), self.name, node.name))
        return PassResult(tuple(sites))

    def places(self, program: Program) -> list[Node]:
        raise NotImplementedError

    def spoil(self, program: Program, node: Node) -> None:
        raise NotImplementedError


def readers(node: Node) -> list[Node]:
    """The linears that read a node."""
    return [user for user in node.users if user.target is aten.linear.default]


def layer_norms(program: Program) -> list[Node]:
    """RMS norms that feed several linears: before attention and before the FFN of each layer."""
    return [node for node in program.nodes(aten.rms_norm.default) if len(readers(node)) > 1]


def scale_gain(program: Program, node: Node, scale: torch.Tensor) -> None:
    gain = node.args[2]
    while gain.op != "get_attr":
        gain = gain.all_input_nodes[0]
    program.set_weight(str(gain.target), program.weight(str(gain.target)) / scale)


@dataclass(frozen=True)
class WrongFold(BrokenPass):
    """Divides a norm's gain by a scale and multiplies all of its readers but one."""

    name = "wrong-fold"

    def places(self, program: Program) -> list[Node]:
        return layer_norms(program)

    def spoil(self, program: Program, node: Node) -> None:
        scale = torch.linspace(0.5, 2, node.meta["val"].shape[-1])
        scale_gain(program, node, scale)
        for linear in readers(node)[:-1]:
            weight = str(linear.args[1].target)
            program.set_weight(weight, program.weight(weight) * scale)


@dataclass(frozen=True)
class OffsetIgnored(BrokenPass):
    """Folds a scale into w where the norm multiplies by (1 + w)."""

    name = "offset-ignored"

    def places(self, program: Program) -> list[Node]:
        return layer_norms(program)

    def spoil(self, program: Program, node: Node) -> None:
        scale = torch.linspace(0.5, 2, node.meta["val"].shape[-1])
        scale_gain(program, node, scale)
        for linear in readers(node):
            weight = str(linear.args[1].target)
            program.set_weight(weight, program.weight(weight) * scale)


@dataclass(frozen=True)
class CentredRmsNorm(BrokenPass):
    """Takes the mean out of what an RMSNorm reads, as if it were a LayerNorm."""

    name = "centred-rms-norm"

    def places(self, program: Program) -> list[Node]:
        return program.nodes(aten.rms_norm.default)

    def spoil(self, program: Program, node: Node) -> None:
        build = Builder(program, node, self.name)
        mean = build.call(aten.mean.dim, node.args[0], [-1], True)
        node.update_arg(0, build.call(aten.sub.Tensor, node.args[0], mean))


@dataclass(frozen=True)
class TiedWeightEdited(BrokenPass):
    """Folds the last norm's gain into the head's weight, which the embedding shares."""

    name = "tied-weight-edited"
    broken_layer: int = 0

    def places(self, program: Program) -> list[Node]:
        tied = [n for n in program.graph.nodes if n.op == "get_attr" and len(n.users) > 1]
        return [u for n in tied for u in n.users if u.target is aten.linear.default]

    def spoil(self, program: Program, node: Node) -> None:
        norm = node.args[0]
        while norm.target is not aten.rms_norm.default:
            norm = norm.all_input_nodes[0]
        weight = str(node.args[1].target)
        scale = torch.linspace(0.5, 2, norm.meta["val"].shape[-1])
        program.set_weight(weight, program.weight(weight) * scale)
        scale_gain(program, norm, scale)


@dataclass(frozen=True)
class SwappedHeads(BrokenPass):
    """Exchanges two query heads of different kv groups and leaves the output projection."""

    name = "swapped-heads"

    def places(self, program: Program) -> list[Node]:
        found = []
        for attention in program.nodes(ops.attention.default):
            node = attention.args[0]
            while node.target is not aten.linear.default:
                node = node.all_input_nodes[0]
            found.append(node)
        return found

    def spoil(self, program: Program, node: Node) -> None:
        name = str(node.args[1].target)
        weight = program.weight(name).clone()
        heads = weight.reshape(4, -1, weight.shape[1])
        program.set_weight(name, heads[[3, 1, 2, 0]].reshape(weight.shape))


@dataclass(frozen=True)
class WindowOffByOne(BrokenPass):
    """Lets each token see one key more than its window."""

    name = "window-off-by-one"

    def places(self, program: Program) -> list[Node]:
        return [
            node
            for node in program.nodes(ops.attention.default)
            if argument(node, "window") is not None
        ]

    def spoil(self, program: Program, node: Node) -> None:
        names = [a.name for a in node.target._schema.arguments]
        node.update_arg(names.index("window"), argument(node, "window") + 1)


@dataclass(frozen=True)
class DroppedBias(BrokenPass):
    """Forgets the bias of one linear."""

    name = "dropped-bias"

    def places(self, program: Program) -> list[Node]:
        linears = program.nodes(aten.linear.default)
        return [node for node in linears if argument(node, "bias") is not None]

    def spoil(self, program: Program, node: Node) -> None:
        node.update_arg(2, None)
