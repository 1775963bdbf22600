"""Apply rules to a captured module and check what every rule promises."""

from collections.abc import Sequence

from torch import Tensor, nn

from fxopt.ir.legality import check_program
from fxopt.ir.program import Program, Refusal
from fxopt.passes.base import Context, PassResult
from fxopt.passes.canonicalize import cleanup, views
from fxopt.passes.canonicalize.canonicalize import Canonicalize
from fxopt.rewrite.driver import apply_rules
from fxopt.rewrite.rule import Rule
from tests.graphs import assert_equivalent, capture_module, signature_of

TIDYING = (*cleanup.RULES, *views.RULES)


def captured(
    module: nn.Module, *tensors: Tensor, dynamic: dict[int, list[int]] | None = None
) -> Program:
    """The program of a module, its views and casts already in their normal form."""
    program = capture_module(module.eval(), *tensors, dynamic=dynamic)
    apply_rules(program, TIDYING, "test")
    cleanup.remove_dead(program)
    return program


def rewrites(
    program: Program, rules: Sequence[Rule], tensors: Sequence[Tensor], expected: int
) -> list[Refusal]:
    """Apply rules; assert their number, equal outputs, valid shapes, and a second run idle."""
    before = program.clone()
    sites, refusals = apply_rules(program, rules, "test")
    assert len(sites) == expected, [site.detail for site in sites]
    cleanup.remove_dead(program)
    program.graph.lint()
    program.graph_module.recompile()
    check_program(program)
    assert_equivalent(program, before, tensors)
    assert (signature_of(program) != signature_of(before)) == (expected > 0)
    after = signature_of(program)
    assert apply_rules(program, rules, "test")[0] == []
    assert signature_of(program) == after
    return refusals


def refused(program: Program, rules: Sequence[Rule], reason: str, done_before: int = 0) -> None:
    """Apply rules that must refuse with this reason and change nothing for it."""
    if done_before:
        sites, _ = apply_rules(program, rules, "test")
        assert len(sites) == done_before, [site.detail for site in sites]
    before = signature_of(program)
    sites, refusals = apply_rules(program, rules, "test")
    assert sites == []
    assert [r.reason for r in refusals if reason in r.reason], [r.reason for r in refusals]
    assert signature_of(program) == before


def canonical(program: Program, tensors: Sequence[Tensor]) -> PassResult:
    """Run the whole pass on a program; outputs stay and a second run does nothing."""
    before = program.clone()
    result = Canonicalize().run(program, Context())
    check_program(program)
    assert_equivalent(program, before, tensors)
    after = signature_of(program)
    again = Canonicalize().run(program, Context())
    assert again.sites == ()
    assert signature_of(program) == after
    return result


__all__ = ["canonical", "captured", "refused", "rewrites"]
