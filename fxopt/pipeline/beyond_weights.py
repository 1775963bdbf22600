"""What a pass did that other values of the model's own weights cannot express."""

from typing import Any

from torch.fx import Node
from torch.fx.node import map_aggregate

from fxopt.ir.program import CONSTANTS, Program, module_path


def beyond_weights(before: Program, after: Program) -> str:
    """The first thing that is more than new values under the model's names; "" where there is none.

    A linear that reads its own weight where it read a tied one is nothing more: the model has a
    name for it.
    """
    return _changed_weights(before, after) or _changed_graph(before, after)


def _changed_weights(before: Program, after: Program) -> str:
    old = before.weights()
    for name, value in after.weights().items():
        was = old.get(name)
        if was is None and name not in before.aliases:
            return f"it reads {name!r}, for which the model has no name"
        if was is None or was.data_ptr() == value.data_ptr():
            continue
        if name.startswith(CONSTANTS):
            return f"it changed {name!r}, which the model computes for itself"
        if was.dtype != value.dtype or was.shape != value.shape:
            made = f"{list(value.shape)} of {value.dtype}"
            return f"it made {name!r} {made}; it was {list(was.shape)} of {was.dtype}"
    return ""


def _changed_graph(before: Program, after: Program) -> str:
    old = [node for node in before.graph.nodes if node.op != "get_attr"]
    new = [node for node in after.graph.nodes if node.op != "get_attr"]
    places = {node: place for nodes in (old, new) for place, node in enumerate(nodes)}
    for was, now in zip(old, new, strict=False):
        if was.target != now.target:
            return f"it computes {now.name} in {module_path(now) or 'the model'}"
        if not _reads_alike(before, was, now, places):
            return f"it changed what {now.name} in {module_path(now) or 'the model'} reads"
    return "" if len(old) == len(new) else "it computes more or less than the model does"


def _reads_alike(before: Program, was: Node, now: Node, places: dict[Node, int]) -> bool:
    def outline(node: Node) -> Any:
        def stand_in(argument: Any) -> Any:
            if not isinstance(argument, Node):
                return argument
            if argument.op != "get_attr":
                return f"%{places[argument]}"
            name = str(argument.target)
            own = node is now and name.rpartition(".")[0] == module_path(node)
            return f"@{before.aliases.get(name, name) if own else name}"

        return str((map_aggregate(node.args, stand_in), map_aggregate(node.kwargs, stand_in)))

    return outline(was) == outline(now)
