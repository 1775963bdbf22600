"""What an allocation of bits may cost: bytes, time, or distance of the output."""

import re
from dataclasses import dataclass, fields
from typing import Literal

from fxopt.errors import RecipeError

Resource = Literal["bytes", "milliseconds"]
_PERCENT = re.compile(r"\s*([0-9.]+)\s*%\s*")


@dataclass(frozen=True)
class Budget:
    """One limit: the least error within a size or a time, or the cheapest within an error.

    Attributes:
        bits: of one stored number, on average, scales and zero points counted.
        bytes: of all weights that are allocated.
        milliseconds: of one call of the whole model at `shape`, [batch, length].
        sqnr_db: signal to noise of the first output, at least.
        kl: of logits, in nats per token, at most.
        perplexity: how much it may rise: 0.01 or "1 %".
        spend: what is made least under an accuracy budget.
    """

    bits: float | None = None
    bytes: int | None = None
    milliseconds: float | None = None
    sqnr_db: float | None = None
    kl: float | None = None
    perplexity: float | str | None = None
    spend: Resource = "bytes"
    shape: tuple[int, int] = (1, 128)

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self)[:6] if getattr(self, field.name) is not None]
        if len(given) != 1:
            known = ", ".join(field.name for field in fields(self)[:6])
            found = " and ".join(given) or "nothing"
            raise RecipeError(f"a budget is one of {known}; found {found}.")
        if given[0] != "sqnr_db" and not self.limit > 0:
            raise RecipeError(f"budget {given[0]} {self.limit:g} is not a positive number.")
        if min(self.shape) < 1:
            raise RecipeError(f"shape {list(self.shape)} is not [batch, length], both positive.")

    @property
    def kind(self) -> str:
        """Which limit it is."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def limit(self) -> float:
        """The limit as a number."""
        value = getattr(self, self.kind)
        if not isinstance(value, str):
            return float(value)
        percent = _PERCENT.fullmatch(value)
        if percent is None:
            raise RecipeError(f"perplexity {value!r} is neither a number nor a percentage.")
        return float(percent.group(1)) / 100

    @property
    def resource(self) -> Resource:
        """What choices are priced in."""
        if self.kind == "milliseconds":
            return "milliseconds"
        return "bytes" if self.kind in ("bits", "bytes") else self.spend

    @property
    def judged_by_output(self) -> bool:
        """Whether the output is limited, and not a resource."""
        return self.kind in ("sqnr_db", "kl", "perplexity")
