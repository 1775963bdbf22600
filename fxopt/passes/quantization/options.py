"""What a recipe says about weights and activations; shared by every pass that quantizes."""

from dataclasses import dataclass, replace
from typing import Literal

from fxopt.analysis.observers import Observer
from fxopt.errors import RecipeError
from fxopt.ir.number_formats import FORMATS, NumberFormat


def _check_zero_point(found: NumberFormat, symmetric: bool) -> None:
    if not symmetric and found.kind != "integer":
        raise RecipeError(
            f"{found.name} has no zero point; leave symmetric out or choose an integer type."
        )


@dataclass(frozen=True)
class WeightOptions:
    """How weights of linears are stored."""

    dtype: Literal["int8", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2", "nf4"] = "int8"
    granularity: Literal["tensor", "channel", "group", "block", "head"] = "channel"
    group_size: int | None = None
    symmetric: bool = True
    block_size: tuple[int, int] | None = None
    range: Literal["absmax", "mse", "output"] = "absmax"
    groups_per_head: int | None = None

    def __post_init__(self) -> None:
        self._check_size("group", "group_size", self.group_size, self.group_size or 0)
        # -1 is the whole axis: [16, -1] are groups of 16 rows.
        smallest = min(1 if size == -1 else size for size in self.block_size or (0,))
        self._check_size("block", "block_size", self.block_size, smallest)
        self._check_size("head", "groups_per_head", self.groups_per_head, self.groups_per_head or 0)
        _check_zero_point(self.format, self.symmetric)

    def _check_size(self, granularity: str, name: str, value: object, smallest: int) -> None:
        if self.granularity == granularity and (value is None or smallest < 1):
            kind = "a positive number"
            if granularity == "block":
                kind = "[rows, columns], each positive or -1 for the whole axis"
            raise RecipeError(f"granularity {granularity!r} needs {name}, {kind}.")
        if self.granularity != granularity and value is not None:
            raise RecipeError(
                f"{name} {value} has no meaning at granularity {self.granularity!r}; set "
                f"granularity to {granularity!r} or leave {name} out."
            )

    def refuse_heads(self, who: str) -> None:
        """Raise where the blocks are those of heads, which only a whole program knows."""
        if self.granularity == "head":
            raise RecipeError(
                f"{who} takes no granularity 'head'; choose 'block' with block_size [rows, -1]."
            )

    @property
    def format(self) -> NumberFormat:
        """The facts of the dtype."""
        return FORMATS[self.dtype]

    @property
    def block(self) -> list[int]:
        """The part of a weight [out, in] that shares a scale; -1 is the whole axis."""
        if self.granularity == "tensor":
            return [-1, -1]
        if self.granularity == "block":
            return list(self.block_size or ())
        return [1, self.group_size or -1]

    def by_head(self, axis: int, size: int) -> "WeightOptions":
        """The same with the blocks of a weight whose heads have `size` places along an axis.

        Where the groups do not divide a head it stays as it is, which is a misfit.
        """
        share, left = divmod(size, self.groups_per_head or 1)
        if left:
            return self
        block = (share, -1) if axis == 0 else (-1, share)
        return replace(self, granularity="block", block_size=block, groups_per_head=None)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why blocks do not divide a weight, or None."""
        if self.granularity == "head":
            return f"no head of attention was found that {self.groups_per_head} groups divide"
        for length, size, axis in zip(shape, self.block, ("outputs", "inputs"), strict=True):
            if size > 0 and length % size:
                return f"{self.granularity} size {size} does not divide its {length} {axis}"
        return None

    def describe(self, channel: str = "channel") -> str:
        """For the report: "int4 weight per group of 64"."""
        sizes = {"channel": channel, "group": f"group of {self.group_size}"}
        if self.block_size is not None:
            rows, columns = self.block_size
            sizes["block"] = f"block of {self.block_size}"
            if rows > 0 and columns == -1:
                sizes["block"] = f"group of {rows} rows"
            elif rows == -1 and columns > 0:
                sizes["block"] = f"group of {columns} columns"
        return f"{self.dtype} weight per {sizes.get(self.granularity, self.granularity)}"


@dataclass(frozen=True)
class ActivationOptions:
    """How inputs of linears are rounded: "token" at run time, the others from calibration.

    "embedding_group" is `groups` spans of consecutive channels, each with a scale of its own. The
    observer says how the range of a tensor is found (see fxopt.analysis.observers).
    """

    dtype: Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2"] = "int8"
    granularity: Literal["token", "tensor", "embedding_group"] = "token"
    symmetric: bool = True
    observer: Observer = "minmax"
    percentile: float = 99.99
    groups: int = 6

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise RecipeError(f"groups {self.groups} is not a positive number.")
        if not 50 < self.percentile <= 100:
            raise RecipeError(f"percentile {self.percentile} is not above 50 and at most 100.")
        if self.observer != "minmax" and self.granularity != "tensor":
            raise RecipeError(
                f"observer {self.observer!r} finds the range of a whole tensor, and granularity is "
                f"{self.granularity!r}; set granularity to 'tensor' or observer to 'minmax'."
            )
        if self.observer == "kl" and self.format.kind != "integer":
            raise RecipeError(
                f"observer 'kl' counts levels of equal width, which {self.dtype} has not; choose "
                "'mse' or 'percentile'."
            )
        _check_zero_point(self.format, self.symmetric)

    @property
    def format(self) -> NumberFormat:
        """The facts of the dtype."""
        return FORMATS[self.dtype]

    @property
    def statistics(self) -> tuple[str, ...]:
        """What calibration must gather."""
        if self.granularity == "token":
            return ()
        further = {"minmax": (), "moving_average": ("batches",)}
        return ("minimum", "maximum", *further.get(self.observer, ("histogram",)))

    def misfit(self, width: int) -> str | None:
        """Why the groups do not divide an activation, or None."""
        if self.granularity == "embedding_group" and width % self.groups:
            return f"{self.groups} groups do not divide its {width} inputs"
        return None

    def describe(self) -> str:
        """For the report: "int8 activation per tensor"."""
        grouped = f"group of embedding dimensions ({self.groups})"
        per = grouped if self.granularity == "embedding_group" else self.granularity
        observed = "" if self.observer == "minmax" else f" ({self.observer} range)"
        return f"{self.dtype} activation per {per}{observed}"


@dataclass(frozen=True)
class EmbeddingOptions:
    """How embedding tables are stored: one scale per row, per group of a row, or for the table."""

    dtype: Literal["int8", "int4", "fp8_e4m3", "nf4"] = "int8"
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None

    def __post_init__(self) -> None:
        self.as_weight()

    def as_weight(self) -> WeightOptions:
        """The same said of a weight [rows, d]."""
        return WeightOptions(self.dtype, self.granularity, self.group_size)


@dataclass(frozen=True)
class Choice:
    """How linears may be stored and their inputs rounded; with neither they stay floating."""

    weights: WeightOptions | None = None
    activations: ActivationOptions | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights.range == "output":
            raise RecipeError("range 'output' judges whole passes; a choice takes absmax or mse.")
        if self.weights is not None:
            self.weights.refuse_heads("a choice")
        if self.activations is not None and self.activations.granularity != "token":
            raise RecipeError(
                f"activations per {self.activations.granularity} need calibration for the choice "
                "that is taken in the end; a choice takes granularity 'token'."
            )

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight cannot be stored so, or None."""
        return None if self.weights is None else self.weights.misfit(shape)

    def describe(self) -> str:
        """For the report: "int4 weight per channel, int8 activation per token"."""
        parts = [part.describe() for part in (self.weights, self.activations) if part is not None]
        return ", ".join(parts) or "floating point"
