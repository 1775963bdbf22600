"""A hidden axis whose basis may be changed: the tensors that hold it, and where."""

from dataclasses import dataclass, replace

import numpy as np

from fxopt.analysis.relations import Kind, Labels, Unit


@dataclass(frozen=True)
class Edit:
    """One tensor that changes with a symmetry.

    `positions` [blocks, size, unit] says where along the flattened `axes` the coordinates stand:
    coordinate c of block b stands at positions[b, c, u] for every u. `inverse` tensors change
    inversely (they are divided where others are multiplied).
    """

    role: str  # "weight", "input", "output" or "operand"
    name: str
    axes: tuple[int, ...]
    positions: Labels
    inverse: bool = False
    offset: float = 0.0
    operand: int = -1

    @property
    def place(self) -> tuple[str, str, tuple[int, ...], bytes]:
        """Which tensor, and where in it: edits of one place change the same numbers."""
        held = np.sort(self.positions, axis=None)
        return self.role, self.name, self.axes, held.tobytes()

    def turned(self) -> "Edit":
        """The same edit with directions counted from the other side."""
        return replace(self, inverse=not self.inverse)

    def __str__(self) -> str:
        axes = ",".join(str(axis) for axis in self.axes)
        unit = self.positions.shape[2]
        wide = f" x{unit}" if unit > 1 else ""
        mark = "/" if self.inverse else ""
        where = f"{self.name}:{self.operand}" if self.role == "operand" else self.name
        return f"{mark}{where}[{axes}]{wide}"


@dataclass(frozen=True)
class Symmetry:
    """A hidden axis: `blocks` independent blocks of `size` coordinates, and all that follows it."""

    kind: Kind
    unit: Unit
    blocks: int
    size: int
    edits: tuple[Edit, ...]
    tags: frozenset[str] = frozenset()

    @property
    def role(self) -> str:
        """What kind of axis it is, told by the operators it passes through."""
        for name in ("heads", "residual", "query_key", "value"):
            if name in self.tags:
                return name
        return "hidden"

    @property
    def planar(self) -> bool:
        """Whether only rotations without a reflection are legal: rotary embedding turns it too."""
        return self.kind is Kind.ROTATE and "rotary_pair" in self.tags

    @property
    def weights(self) -> tuple[Edit, ...]:
        """The edits of weights."""
        return tuple(edit for edit in self.edits if edit.role == "weight")

    @property
    def path(self) -> str:
        """A short name for reports: the module that first writes the axis."""
        return self.weights[0].name.rpartition(".")[0] if self.weights else ""

    def __str__(self) -> str:
        shape = f"{self.blocks} x {self.size}" if self.blocks > 1 else f"{self.size}"
        return f"{self.role} ({shape}): {', '.join(str(edit) for edit in self.edits)}"
