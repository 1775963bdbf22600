"""The table of op rules: what each operator does to the axes of its operands.

A rule is called with the relations collected so far and a node; it relates the labels of the
operands and returns those of the result (a list of them for an operator with several results).
An operator without a rule blocks: whatever it reads may not change.
"""

from collections.abc import Callable
from typing import Any

from torch.fx import Node

import fxopt.ir.operators  # noqa: F401 # pyright: ignore[reportUnusedImport] - rules name them
from fxopt.analysis.relations import Labels, Relations
from fxopt.errors import AnalysisError

OpRule = Callable[[Relations, Node], Labels | list[Labels]]
_TABLE: dict[Any, OpRule] = {}


def op_rule(*targets: Any) -> Callable[[OpRule], OpRule]:
    """Enter a rule for some operators.

    Raises:
        AnalysisError: one of them has a rule already.
    """

    def enter(rule: OpRule) -> OpRule:
        for target in targets:
            if target in _TABLE:
                raise AnalysisError(f"{target} has two op rules; remove one of them.")
            _TABLE[target] = rule
        return rule

    return enter


def rule_of(target: Any) -> OpRule | None:
    """The rule of an operator, or None."""
    return _TABLE.get(target)


def known_operators() -> list[Any]:
    """Every operator that has a rule."""
    return list(_TABLE)
