"""A program's graph as JSON and back, without evaluating or importing anything it names.

fx turns a graph into Python source and executes that; so every name in a stored graph is checked
to be a plain identifier before it gets near fx, and every target comes from
`fxopt.runtime.stored_operators`.
"""

import importlib.metadata
import keyword
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxopt.errors import LoadError, SaveError
from fxopt.ir.program import Level, PassRecord, Program, WeightTree, assign_weight, module_path
from fxopt.ir.signature import Signature
from fxopt.ir.text import format_size, size_names
from fxopt.runtime.stored_arguments import DTYPES, decode, encode
from fxopt.runtime.stored_operators import FUNCTIONS, name_of_target, target_of_name
from fxopt.runtime.stored_shapes import example_sizes
from fxopt.runtime.stored_weights import StoredWeight

FORMAT_VERSION = 1
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WEIGHT_NAME = re.compile(r"[\w\-:/+@ ]+(\.[\w\-:/+@ ]+)*")


class StoredNode(BaseModel):
    """One node of a stored graph."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    op: Literal["placeholder", "get_attr", "call_function", "output"]
    target: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    value: Any = None  # what the node returns, for readers of the file
    module_path: str = ""
    from_node: list[dict[str, str]] = []


class StoredGraph(BaseModel):
    """The graph file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["fxopt.program"] = "fxopt.program"
    version: int = FORMAT_VERSION
    written_by: dict[str, str] = Field(default_factory=dict[str, str])
    level: Literal["CAPTURED", "CANONICAL", "QUANTIZED", "LOWERED"]
    signature: dict[str, Any]
    sizes: dict[str, int]
    nodes: list[StoredNode]
    weights: dict[str, StoredWeight]
    aliases: dict[str, str]
    layouts: dict[str, str]
    history: list[dict[str, Any]]
    notes: list[str]
    extra: dict[str, Any]


def versions() -> dict[str, str]:
    """The versions that a stored folder and a report name."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    try:
        found["fxopt"] = importlib.metadata.version("fxopt")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        found["fxopt"] = "unknown"
    return found


# --- writing --------------------------------------------------------------------------------


def encode_graph(
    program: Program, weights: dict[str, StoredWeight], extra: dict[str, Any]
) -> StoredGraph:
    """A program as the graph file holds it.

    Raises:
        SaveError: the graph has an operator, an argument or a name that cannot be stored.
    """
    symbols = size_names(program)
    return StoredGraph(
        written_by=versions(),
        level=program.level.name,
        signature=program.signature.to_dict(),
        sizes=example_sizes(program),
        nodes=[_encode_node(node, symbols) for node in program.graph.nodes],
        weights=weights,
        aliases=program.aliases,
        layouts=program.layouts,
        history=[record.to_dict() for record in program.history],
        notes=program.notes,
        extra=extra,
    )


def _encode_node(node: Node, symbols: dict[str, str]) -> StoredNode:
    where = f"node {node.name!r}"
    target = str(node.target) if node.op != "call_function" else name_of_target(node.target)
    if target is None or node.op in ("call_module", "call_method"):
        raise SaveError(
            f"{where} of {module_path(node) or 'the model'} calls {node.target}, which a stored "
            "graph cannot name: only operators of fxopt, those of aten that check all of their "
            "arguments, and the arithmetic of sizes can be stored. Write the computation with "
            "those."
        )
    if node.op == "get_attr" and not _WEIGHT_NAME.fullmatch(target):
        raise SaveError(
            f"weight {target!r} has a name that cannot be stored; rename the model's module."
        )
    return StoredNode(
        name=node.name,
        op=node.op,  # type: ignore[arg-type]
        target=target,
        args=[encode(argument, where) for argument in node.args],
        kwargs={name: encode(value, where) for name, value in node.kwargs.items()},
        value=_describe(node.meta.get("val"), symbols),
        module_path=module_path(node),
        from_node=[
            {str(key): str(value) for key, value in origin.items()}
            for origin in node.meta.get("from_node", [])
        ],
    )


def _describe(value: Any, symbols: dict[str, str]) -> Any:
    if isinstance(value, Tensor):
        shape = [
            format_size(size, symbols) if hasattr(size, "node") else size for size in value.shape
        ]
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
    if isinstance(value, list | tuple):
        return [_describe(item, symbols) for item in value]
    return None if value is None else {"size": format_size(value, symbols)}


# --- reading --------------------------------------------------------------------------------


def parse_graph(text: str) -> StoredGraph:
    """Check the form of a graph file.

    Raises:
        LoadError: it is not one.
    """
    try:
        return StoredGraph.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise LoadError(
            f"graph.json is not a graph of fxopt ({place}: {first['msg']}); the folder is damaged. "
            "Save the model again."
        ) from error


def decode_graph(stored: StoredGraph, weights: dict[str, Tensor]) -> Program:
    """Build the program that a graph file and its weights hold.

    Raises:
        LoadError: the graph is not one that fxopt writes.
    """
    signature = _decode_signature(stored.signature)
    _check_interface(stored, signature)
    _check_names(stored, weights)
    root = WeightTree()
    for name, tensor in weights.items():
        assign_weight(root, name, tensor)
    graph = Graph()
    nodes: dict[str, Node] = {}
    writer = stored.written_by.get("fxopt", "unknown")
    for data in stored.nodes:
        nodes[data.name] = _decode_node(graph, data, nodes, writer)
    graph.lint()
    graph_module = GraphModule(root, graph, class_name="FxoptGraph")
    graph_module.eval()
    return Program(
        graph_module,
        signature,
        level=Level[stored.level],
        history=[PassRecord.from_dict(record) for record in stored.history],
        aliases=stored.aliases,
        layouts=stored.layouts,
        notes=stored.notes,
    )


def _decode_node(graph: Graph, data: StoredNode, nodes: dict[str, Node], writer: str) -> Node:
    where = f"node {data.name!r}"
    args = tuple(decode(argument, nodes, where) for argument in data.args)
    kwargs = {name: decode(value, nodes, where) for name, value in data.kwargs.items()}
    target: Any = data.target
    if data.op == "call_function":
        target = target_of_name(data.target)
        if target is None:
            raise LoadError(
                f"{where} calls {data.target!r}, which this fxopt does not know or does not let a "
                f"stored graph call. The folder was written by fxopt {writer}; install that "
                "version, or save the model again with this one."
            )
        if data.target in FUNCTIONS and not all(_is_scalar(v) for v in [*args, *kwargs.values()]):
            raise LoadError(
                f"{where} calls {data.target!r} on something that is no number; the folder was "
                "not written by fxopt. Do not use it."
            )
    node = graph.create_node(data.op, target, args, kwargs, name=data.name)
    if node.name != data.name:
        raise _bad_name("node", data.name)
    node.meta["module_path"] = data.module_path
    node.meta["from_node"] = data.from_node
    return node


def _is_scalar(value: Any) -> bool:
    # Python's own functions repeat strings and lists; on numbers and values they do arithmetic.
    if isinstance(value, tuple):  # the index of a getitem
        return all(_is_scalar(item) for item in value)
    return value is None or value is ... or isinstance(value, Node | int | float | slice)


def _check_names(stored: StoredGraph, weights: dict[str, Tensor]) -> None:
    seen: set[str] = set()
    for node in stored.nodes:
        names = [node.name, *node.kwargs]
        if node.op in ("placeholder", "output"):
            names.append(node.target)
        for name in names:
            if not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
                raise _bad_name("node", name)
        if node.name in seen:
            raise LoadError(f"two nodes are called {node.name!r}; the folder is damaged.")
        seen.add(node.name)
        if node.op == "get_attr" and node.target not in weights:
            raise LoadError(
                f"node {node.name!r} reads weight {node.target!r}, which is not stored; the "
                "folder is damaged. Save the model again."
            )
    for name in weights:
        reserved = any(part.startswith("__") for part in name.split("."))
        if not _WEIGHT_NAME.fullmatch(name) or reserved:
            raise _bad_name("weight", name)


def _bad_name(kind: str, name: str) -> LoadError:
    return LoadError(
        f"{name[:60]!r} is no name of a {kind} that fxopt writes; the folder is damaged or "
        "hostile. Do not use it."
    )


def _check_interface(stored: StoredGraph, signature: Signature) -> None:
    ops = [node.op for node in stored.nodes]
    if ops.count("output") != 1 or ops[-1] != "output":
        raise LoadError("graph.json has no output at its end; the folder is damaged.")
    output = stored.nodes[-1].args
    results = output[0] if len(output) == 1 else None
    if isinstance(results, dict) and set(results) == {"tuple"}:
        results = results["tuple"]
    count = len(results) if isinstance(results, list) else -1
    if ops.count("placeholder") != len(signature.inputs) or count != len(signature.outputs):
        raise LoadError(
            f"the graph takes {ops.count('placeholder')} inputs and returns {count} outputs, the "
            f"signature says {len(signature.inputs)} and {len(signature.outputs)}; the folder is "
            "damaged. Save the model again."
        )
    if any(node.args or node.kwargs for node in stored.nodes if node.op == "placeholder"):
        raise LoadError("an input of the graph has arguments; the folder is damaged.")


def _decode_signature(data: dict[str, Any]) -> Signature:
    for spec in [*data["inputs"], *data["outputs"]]:
        if spec["dtype"] not in DTYPES:
            raise LoadError(f"there is no dtype {spec['dtype']!r}; the folder is damaged.")
        if not all(type(size) in (int, str) for size in spec["shape"]):
            raise LoadError(f"the shape of {spec['name']!r} is damaged. Save the model again.")
    for side in ("input", "output"):
        _check_structure(data[f"{side}_structure"], len(data[f"{side}s"]))
    return Signature.from_dict(data)


def _check_structure(structure: dict[str, Any], count: int) -> None:
    """Refuse a structure that names anything but tensors, constants and containers."""
    kind = structure["kind"]
    children: list[Any] = []
    if kind == "tensor":
        if type(structure["index"]) is not int or not 0 <= structure["index"] < count:
            raise LoadError("the signature names a tensor that is not there.")
    elif kind in ("model_output", "named_tuple"):
        for name in (structure["class"], *structure["fields"]):
            if not _IDENTIFIER.fullmatch(name) or name.startswith("_") or keyword.iskeyword(name):
                raise _bad_name("result", name)
        children = list(structure["fields"].values())
    elif kind == "dict":
        children = [item for _, item in structure["items"]]
    elif kind in ("list", "tuple"):
        children = structure["items"]
    elif kind != "constant":
        raise LoadError(f"unknown container {str(kind)[:40]!r} in the signature.")
    for child in children:
        _check_structure(child, count)
