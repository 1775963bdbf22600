"""Replace operators that write to their input by twins that return the result.

    x.add_(y); f(x)      =   z = x + y; f(z)
    x[i].add_(y); f(x)   =   z = scatter(x, i, x[i] + y); f(z)

Shapes: any.
Exactness: bit-equal. A write is replaced only if nothing else can see the memory it changes.
"""

import itertools
import operator
from typing import Any

import torch
from torch.fx import Node

from fxopt.ir.program import Program, Refusal, Site, dtype_of, module_path
from fxopt.rewrite.builder import Builder
from fxopt.rewrite.driver import erase_dead
from fxopt.rewrite.pattern import packet_of

aten = torch.ops.aten

# They write nothing but bookkeeping; cleanup drops them.
_HARMLESS = (aten.detach_.default, aten.requires_grad_.default)
# A write through a view is a result put back where the view was taken.
_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def make_functional(program: Program, made_by: str) -> tuple[list[Site], list[Refusal]]:
    """Replace every operator that writes to its input, or say why one must stay."""
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for node in [node for node in program.nodes() if is_mutable(node)]:
        if node.target in _HARMLESS:
            node.replace_all_uses_with(node.all_input_nodes[0])
            erase_dead([node])
            continue
        reason = _obstacle(program, node)
        if reason is not None:
            refusals.append(Refusal(f"{module_path(node)} [{node.name}]", reason))
            continue
        sites.append(Site(module_path(node), "functional form", node.name))
        _replace(program, node, made_by)
    return sites, refusals


def is_mutable(node: Node) -> bool:
    """Whether a call writes to one of its arguments."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def twin(target: Any) -> Any | None:
    """The overload that returns what `target` writes: `aten.add.Tensor` for `aten.add_.Tensor`."""
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)


def _obstacle(program: Program, node: Node) -> str | None:
    if twin(node.target) is None:
        return f"{node.target} writes to its input and has no twin that returns the result"
    written = node.args[0]
    if not isinstance(written, Node):
        return f"{node.target} writes to something that is not a tensor of the graph"
    chain = views_above(written)
    for other in _aliases(program)[written]:
        if other.op in ("placeholder", "get_attr"):
            kind = "an input" if other.op == "placeholder" else "a weight"
            return f"{node.target} writes to {kind} ({other.target}), which the caller can see"
        # A view taken later is computed from the result; one taken earlier would show old values.
        if other < node and other not in chain and (readers := _later_readers(other, node)):
            return f"{node.target} writes to memory that {readers[0].name!r} reads through a view"
    for view in _read_later(chain, node)[:-1]:
        if view.target not in _SCATTERS:
            return f"{node.target} writes through a {view.target} of something that is read later"
    return None


def _later_readers(node: Node, write: Node) -> list[Node]:
    return [user for user in node.users if write < user]


def _read_later(chain: list[Node], write: Node) -> list[Node]:
    """The chain up to the last tensor that is read after the write."""
    needed = [index for index, view in enumerate(chain) if _later_readers(view, write)]
    return chain[: needed[-1] + 1] if needed else []


def views_above(node: Node) -> list[Node]:
    """A node, what it is or may be a view of, what that is a view of, and so on."""
    chain = [node]
    while (source := _viewed(chain[-1])) is not None:
        chain.append(source)
    return chain


def _aliases(program: Program) -> dict[Node, set[Node]]:
    """For every node, all nodes that may share its memory."""
    groups: dict[Node, set[Node]] = {}
    for node in program.graph.nodes:
        source = _viewed(node)
        group = groups[source] if source is not None else set[Node]()
        group.add(node)
        groups[node] = group
    return groups


def _viewed(node: Node) -> Node | None:
    """The argument whose memory a call may return; None when the result is fresh."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    if node.target is operator.getitem:
        if _viewed(source) is not None:  # one of the views that a split returns
            return source
        twins = [user for user in source.users if user.args == node.args]
        return twins[0] if twins[0] is not node else None
    if packet_of(node) is aten.to and dtype_of(node) != dtype_of(source):
        return None  # a conversion copies
    schema = getattr(node.target, "_schema", None)
    shared = schema and any(argument.alias_info is not None for argument in schema.arguments)
    return source if shared else None


def _replace(program: Program, node: Node, made_by: str) -> None:
    build = Builder(program, node, f"{made_by}/functional")
    written = node.args[0]
    assert isinstance(written, Node)  # noqa: S101 - `_obstacle` looked
    result = build.call(twin(node.target), *node.args, **node.kwargs)
    if dtype_of(result) != dtype_of(written):  # a write keeps the dtype, its twin promotes
        result = build.call(aten.to.dtype, result, dtype_of(written))
    node.replace_all_uses_with(result)
    _let_read(written, result, node)
    for view, source in itertools.pairwise(_read_later(views_above(written), node)):
        result = build.call(_SCATTERS[view.target], source, result, *view.args[1:])
        _let_read(source, result, node)
    erase_dead([node])


def _let_read(old: Node, new: Node, write: Node) -> None:
    for user in _later_readers(old, write):
        user.replace_input_with(old, new)
