"""What every operator does to the axes of its operands; one file per family, one table."""

from fxopt.analysis.op_rules import attention, contraction, elementwise, norms, views
from fxopt.analysis.op_rules.registry import known_operators, op_rule, rule_of

__all__ = [
    "attention",
    "contraction",
    "elementwise",
    "known_operators",
    "norms",
    "op_rule",
    "rule_of",
    "views",
]
