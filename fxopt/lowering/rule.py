"""A lowering rule: a rewrite rule that names its kernel, and may be timed before it is used."""

from collections.abc import Mapping
from typing import ClassVar

from torch.fx import Node

from fxopt.rewrite.pattern import Match
from fxopt.rewrite.rule import Rule

# Who rounds weights alone asks for memory first.
WEIGHT_ONLY = 1.5


class LoweringRule(Rule):
    """A rule whose replacement is a kernel.

    Attributes:
        kernel: the operator that it writes.
        patience: how much longer than what it replaces the kernel may take and still be used. The
            usual figure is the clock's own uncertainty; where the alternative is to hold a weight
            in floating point, memory is worth some time.
        joins: whether it joins kernels that are in place already. A model that was saved with
            decisions and none on it, before there was such a rule, keeps them apart.
    """

    kernel: ClassVar[str] = ""
    patience: ClassVar[float] = 1.03
    joins: ClassVar[bool] = False

    def kept(self, match: Match) -> tuple[Node, ...]:
        """Nodes of the match beside its root that others read, and that the kernel returns too."""
        del match
        return ()

    def routings(self, match: Match) -> Mapping[Node, int]:
        """Indices that a site is timed with in turn, 0 to the number less one.

        Others point at one row, as a token does: those of a mixture would all be at one expert.
        """
        del match
        return {}
