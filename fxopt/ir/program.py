"""Program: a captured model as a graph, its weights, and what has been done to it."""

import copy
import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxopt.errors import IllegalGraphError
from fxopt.ir.signature import Signature

# Under this name lie tensors that the model holds nowhere: literals in its code, folded results.
CONSTANTS = "constants."


class Level(enum.IntEnum):
    """How far a program has come; `fxopt.ir.legality` says what each level allows."""

    CAPTURED = 0
    CANONICAL = 1
    QUANTIZED = 2
    LOWERED = 3


@dataclass(frozen=True)
class Site:
    """One place a pass rewrote: the module it belongs to, and what changed there."""

    path: str
    detail: str
    node: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain data for the report."""
        return {"path": self.path, "detail": self.detail, "node": self.node}


@dataclass(frozen=True)
class Refusal:
    """One place a pass left alone, and why, in words for the user."""

    site: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """Plain data for the report."""
        return {"site": self.site, "reason": self.reason}


@dataclass(frozen=True)
class Table:
    """Figures that a pass reports, row by row; a plot shows column `y` over column `x`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]
    x: str = ""
    y: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [list(row) for row in self.rows],
            "x": self.x,
            "y": self.y,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Table":
        """The inverse of `to_dict`."""
        rows = tuple(tuple(row) for row in data["rows"])
        return Table(data["title"], tuple(data["columns"]), rows, data["x"], data["y"])


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: kept in `Program.history` and stored with the model.

    `beyond_weights` says what it did that other values of the model's own weights cannot
    express; it is empty for a pass that only changed such values. `calibration` says how it came
    by what it needed of calibration data: "read" for it, "carried over" from an earlier pass.
    """

    name: str
    options: dict[str, Any]
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    exactness: str = "equivalent"
    verification: dict[str, Any] = field(default_factory=dict[str, Any])
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    beyond_weights: str = ""
    tables: tuple[Table, ...] = ()
    calibration: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "name": self.name,
            "options": self.options,
            "sites": [site.to_dict() for site in self.sites],
            "refusals": [refusal.to_dict() for refusal in self.refusals],
            "exactness": self.exactness,
            "verification": self.verification,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "beyond_weights": self.beyond_weights,
            "tables": [table.to_dict() for table in self.tables],
            "calibration": self.calibration,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "PassRecord":
        """The inverse of `to_dict`."""
        plain: dict[str, Any] = {"beyond_weights": "it was recorded by an older fxopt", **data}
        plain["sites"] = tuple(Site(**site) for site in data["sites"])
        plain["refusals"] = tuple(Refusal(**refusal) for refusal in data["refusals"])
        plain["notes"] = tuple(data["notes"])
        plain["tables"] = tuple(Table.from_dict(table) for table in data.get("tables", ()))
        return PassRecord(**plain)


class WeightTree(nn.Module):
    """A bare module tree that carries weights under the model's own dotted names."""


@dataclass
class Program:
    """A model as an fx graph of ATen and `fxopt::` operators.

    Every tensor the graph reads is an attribute of `graph_module` under the name it had in the
    model. A tensor that the model holds under several names (tied weights) is held once, under
    the first; `aliases` maps the other names to it. `layouts` names the weights that are stored
    in another layout than the model's ("transposed"). `examples` are flat inputs at several sizes
    on which the program is known to run; they are not stored with it.
    """

    graph_module: GraphModule
    signature: Signature
    level: Level = Level.CAPTURED
    history: list[PassRecord] = field(default_factory=list[PassRecord])
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    layouts: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])
    examples: list[list[Tensor]] = field(default_factory=list[list[Tensor]])

    @property
    def graph(self) -> Graph:
        """The graph itself."""
        return self.graph_module.graph

    def nodes(self, *targets: Any) -> list[Node]:
        """Call nodes whose target is one of `targets` (all call nodes when none is given)."""
        calls = [node for node in self.graph.nodes if node.op == "call_function"]
        return [node for node in calls if node.target in targets] if targets else calls

    def weights(self) -> Mapping[str, Tensor]:
        """Every tensor the graph module holds, by name; tied tensors appear once."""
        return dict(iterate_weights(self.graph_module))

    def weight(self, name: str) -> Tensor:
        """One tensor by its dotted name."""
        owner, _, leaf = name.rpartition(".")
        return getattr(self.graph_module.get_submodule(owner), leaf)

    def constant(self, value: Any) -> Tensor | None:
        """The tensor behind a `get_attr` node, or None when `value` is anything else."""
        if isinstance(value, Node) and value.op == "get_attr":
            return self.weight(str(value.target))
        return None

    def set_weight(self, name: str, value: Tensor) -> None:
        """Store `value` under `name`, replacing what was there; other programs keep theirs."""
        assign_weight(self.graph_module, name, value)

    def remove_unused_weights(self) -> list[str]:
        """Drop tensors that no `get_attr` node reads; returns their names."""
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        unused = [name for name in self.weights() if name not in used]
        for name in unused:
            owner, _, leaf = name.rpartition(".")
            delattr(self.graph_module.get_submodule(owner), leaf)
        self.aliases = {alias: name for alias, name in self.aliases.items() if name in used}
        return unused

    def release(self) -> None:
        """Forget all weights now; a graph and its module are a cycle that is collected late."""
        for name in self.weights():
            owner, _, leaf = name.rpartition(".")
            delattr(self.graph_module.get_submodule(owner), leaf)

    def byte_count(self) -> int:
        """Bytes of all weights and buffers, each storage counted once."""
        return bytes_held([self])

    def clone(self) -> "Program":
        """A copy whose graph and weight table may change freely; tensors are shared."""
        graph = Graph()
        copied: Any = graph.graph_copy(self.graph, {}, return_output_node=True)
        value, old_output = copied
        graph.output(value).meta = copy.copy(old_output.meta)
        root = WeightTree()
        for name, tensor in iterate_weights(self.graph_module):
            assign_weight(root, name, tensor)
        graph_module = GraphModule(root, graph, class_name=type(self.graph_module).__name__)
        return replace(
            self,
            graph_module=graph_module,
            history=list(self.history),
            aliases=dict(self.aliases),
            layouts=dict(self.layouts),
            notes=list(self.notes),
        )


def bytes_held(programs: Iterable[Program]) -> int:
    """Bytes of the weights and buffers of several programs, what they share counted once."""
    storages = {
        tensor.untyped_storage().data_ptr() or id(tensor): tensor.untyped_storage().nbytes()
        for program in programs
        for _, tensor in iterate_weights(program.graph_module)
    }
    return sum(storages.values())


def iterate_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, each with its dotted name."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def assign_weight(root: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor at a dotted name, making the modules on the way.

    Floating tensors become parameters that need no gradient, all others buffers.

    Raises:
        IllegalGraphError: the path runs through something that is not a module.
    """
    owner_path, _, leaf = name.rpartition(".")
    owner = root
    for part in owner_path.split(".") if owner_path else ():
        if not hasattr(owner, part):
            owner.add_module(part, WeightTree())
        child = getattr(owner, part)
        if not isinstance(child, nn.Module):
            raise IllegalGraphError(
                f"cannot store weight {name!r}: {part!r} on its path is a {type(child).__name__}, "
                "not a module. Choose another name."
            )
        owner = child
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    if value.is_floating_point():
        owner.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=False))
    else:
        owner.register_buffer(leaf, value.detach())


def has_effect(node: Node) -> bool:
    """Whether a node must stay although nothing reads its result."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(getattr(schema, "is_mutable", False))


def module_path(node: Node) -> str:
    """The path of the model's module that a node came from, as the user knows it."""
    return str(node.meta.get("module_path", ""))


def shape_of(value: Any) -> tuple[Any, ...]:
    """The recorded shape of a node's tensor; () for anything that is not a tensor."""
    recorded = value.meta.get("val") if isinstance(value, Node) else None
    return tuple(recorded.shape) if isinstance(recorded, torch.Tensor) else ()


def hints(shape: Iterable[Any]) -> list[int | None]:
    """Sizes as they were at capture, to compare by.

    Capture sizes are all different, so equal hints mean equal dimensions. A size that depends on
    a tensor's values has no hint, and a new symbol each time: all such sizes count as equal.
    """
    return [size if type(size) is int else size.node.hint for size in shape]


def dtype_of(value: Any) -> torch.dtype | None:
    """The recorded dtype of a node's tensor, or None."""
    recorded = value.meta.get("val") if isinstance(value, Node) else None
    return recorded.dtype if isinstance(recorded, torch.Tensor) else None
