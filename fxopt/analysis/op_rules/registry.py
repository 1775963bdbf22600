"""The table of op rules: what each operator does to the axes of its operands.

A rule is called with the relations collected so far and a node; it relates the labels of the
operands and returns those of the result (a list of them for an operator with several results).
An operator without a rule blocks: whatever it reads may not change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

import fxopt.ir.operators  # noqa: F401 # pyright: ignore[reportUnusedImport] - rules name them
from fxopt.analysis.relations import Labels, Relations
from fxopt.errors import AnalysisError

OpRule = Callable[[Relations, Node], Labels | list[Labels]]


@dataclass(frozen=True)
class Entry:
    """What the table says of an operator.

    Attributes:
        rule: how the labels of its operands and results are related.
        by_element: each place of the result is computed from that place of its operands alone,
            where shapes are aligned at the last axis and an axis of size one stands for any place.
    """

    rule: OpRule
    by_element: bool = False


_TABLE: dict[Any, Entry] = {}


def op_rule(*targets: Any, by_element: bool = False) -> Callable[[OpRule], OpRule]:
    """Enter a rule for some operators.

    Raises:
        AnalysisError: one of them has a rule already.
    """

    def enter(rule: OpRule) -> OpRule:
        for target in targets:
            if target in _TABLE:
                raise AnalysisError(f"{target} has two op rules; remove one of them.")
            _TABLE[target] = Entry(rule, by_element)
        return rule

    return enter


def rule_of(target: Any) -> OpRule | None:
    """The rule of an operator, or None."""
    entry = _TABLE.get(target)
    return None if entry is None else entry.rule


def is_by_element(target: Any) -> bool:
    """Whether an operator is known to work place by place."""
    entry = _TABLE.get(target)
    return entry is not None and entry.by_element


def known_operators() -> list[Any]:
    """Every operator that has a rule."""
    return list(_TABLE)
