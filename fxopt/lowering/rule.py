"""A lowering rule: a rewrite rule that names its kernel, and may be timed before it is used."""

from typing import ClassVar

from fxopt.rewrite.rule import Rule


class LoweringRule(Rule):
    """A rule whose replacement is a kernel."""

    kernel: ClassVar[str] = ""
