"""What every operator does to the axes of its operands; one file per family, one table."""

from fxopt.analysis.op_rules import attention, contraction, elementwise, norms, views
from fxopt.analysis.op_rules.broadcast import FACTORS
from fxopt.analysis.op_rules.registry import is_by_element, known_operators, op_rule, rule_of

__all__ = [
    "FACTORS",
    "attention",
    "contraction",
    "elementwise",
    "is_by_element",
    "known_operators",
    "norms",
    "op_rule",
    "rule_of",
    "views",
]
