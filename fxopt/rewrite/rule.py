"""A rewrite rule: what to find, when not to touch it, and what to put in its place."""

import inspect
from typing import Any, ClassVar

from torch.fx import Node

from fxopt.ir.program import Program
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.pattern import Match, PatternOperators, Variable


class Rule:
    """Base of all rules.

    A rule is three methods side by side. `pattern` builds the pattern by calling operators on
    variables (its parameter names); it may return a list of alternatives. `check` is pure: it
    returns a reason to refuse, written for the user, or None. `rewrite` builds the replacement
    through the builder and returns the node that takes the root's place.

    Some facts that make a computation what it is cannot be said in a pattern (the two slices are
    the two halves). `condition` says them. Where it is False the rule was never meant, so there
    is no refusal to report.
    """

    benefit: ClassVar[int] = 0  # higher is tried first at the same root
    detail: ClassVar[str] = ""  # what the report says was done; the rule's name when empty

    def pattern(self, *operators_and_variables: Any, **_: Any) -> Any:
        """The computation to find: `pattern(self, op, x, ...)`, one parameter per variable."""
        raise NotImplementedError

    def condition(self, program: Program, match: Match) -> bool:
        """What the pattern cannot say; False is silent."""
        del program, match
        return True

    def check(self, program: Program, match: Match) -> str | None:
        """A reason to leave this match alone, or None."""
        del program, match
        return None

    def rewrite(self, build: Builder, match: Match) -> Node:
        """Build the replacement for the match's root."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The rule's class name: it says what the rule does."""
        return type(self).__name__

    def patterns(self) -> list[Any]:
        """The alternatives of `pattern`, on fresh variables."""
        names = list(inspect.signature(self.pattern).parameters)[1:]
        found = self.pattern(PatternOperators(), *(Variable(name) for name in names))
        return found if isinstance(found, list) else [found]
