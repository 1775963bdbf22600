"""Write a pass of your own and use it by name: GELU in its tanh form, its cost in decibels."""

from dataclasses import dataclass

import torch

import fxopt
from fxopt.ir.program import Level, Program
from fxopt.passes.base import Context, Exactness, Pass, PassResult, register
from fxopt.rewrite.driver import apply_rules
from fxopt.rewrite.rule import Rule

aten = torch.ops.aten


class TanhGelu(Rule):
    """`gelu(x)` becomes `gelu(x, "tanh")`."""

    def pattern(self, op, x):
        """The exact form."""
        return op.gelu(x)

    def rewrite(self, build, match):
        """Its approximation."""
        return build.call(aten.gelu.default, match.x, approximate="tanh")


@register("tanh-gelu")
@dataclass(frozen=True)
class TanhGeluPass(Pass):
    """Replace GELU by its tanh approximation."""

    exactness = Exactness.APPROXIMATE
    input_level = Level.CANONICAL
    after = ("canonicalize",)

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrite every GELU."""
        sites, refusals = apply_rules(program, [TanhGelu()], self.name)
        return PassResult(tuple(sites), tuple(refusals))


model = torch.nn.Sequential(
    torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16)
).eval()
optimized = fxopt.optimize(
    model, ["canonicalize", TanhGeluPass()], example_inputs=(torch.randn(4, 16),)
)
print(optimized.report)
print(optimized.explain("1"))
