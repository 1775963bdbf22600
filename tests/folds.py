"""A pass that edits weights and is right, and one that is wrong by less than float32 shows."""

import dataclasses

import torch

from fxopt.ir.program import Program, Site, module_path
from fxopt.passes.base import Context, Pass, PassResult
from tests import broken_passes


@dataclasses.dataclass(frozen=True)
class RightFold(Pass):
    """A correct version of the fold that `WrongFold` gets wrong."""

    name = "right-fold"

    def run(self, program: Program, context: Context) -> PassResult:
        sites = []
        for node in broken_passes.layer_norms(program):
            scale = torch.linspace(0.5, 2, node.meta["val"].shape[-1])
            broken_passes.scale_gain(program, node, scale)
            for linear in broken_passes.readers(node):
                weight = str(linear.args[1].target)
                program.set_weight(weight, program.weight(weight) * scale)
            sites.append(Site(module_path(node), "fold", node.name))
        return PassResult(tuple(sites))


@dataclasses.dataclass(frozen=True)
class NudgedFold(RightFold):
    """Also moves one gain by a millionth: some units in the last place of float32."""

    name = "nudged-fold"

    def run(self, program: Program, context: Context) -> PassResult:
        result = super().run(program, context)
        node = broken_passes.layer_norms(program)[2]
        broken_passes.scale_gain(program, node, torch.full((32,), 1 + 1e-6))
        return result
