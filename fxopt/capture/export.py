"""Run torch.export on a callable and hand back a clean, flat graph."""

import contextlib
import copy
import operator
import re
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from fxopt.capture.evaluation import evaluation_mode
from fxopt.capture.grouped_products import take_any_dtype
from fxopt.capture.parametrizations import compute_parametrized_weights
from fxopt.capture.ranges import SizeFacts, size_facts
from fxopt.capture.tensors import named_tensors
from fxopt.errors import CaptureError
from fxopt.ir.program import CONSTANTS, WeightTree, assign_weight, has_effect
from fxopt.ir.signature import Dimension

aten = torch.ops.aten

# They state facts about the example, or about training; what they say of sizes is in SizeFacts.
_ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)
# Where the frames of a traceback are not the model's own.
_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_REGION_CALLS = (
    torch.ops.higher_order.wrap_with_set_grad_enabled,
    torch.ops.higher_order.wrap_with_autocast,
)


def export_flat(
    module: nn.Module,
    forward: Callable[..., list[Tensor]],
    tensors: dict[str, Tensor],
    dynamic: dict[str, list[int]] | None = None,
) -> tuple[GraphModule, dict[str, str], SizeFacts]:
    """Export `forward(*tensors)` with `module`'s weights under their own names.

    `dynamic` names the axes of each input that may vary; without it every axis may, and
    torch.export fixes those that the model itself fixes. The graph that comes back takes and
    returns flat tensors.

    Returns:
        the graph module, the names of tied weights mapped to the name they are held under, and
        what holds for the sizes.

    Raises:
        CaptureError: torch.export refused the model.
    """
    counts: list[int] = []

    def flat_forward(*args: Tensor) -> list[Tensor]:
        try:
            results = forward(*args)
        except Exception as error:
            raise _ModelError from error
        counts.append(len(results))
        return results

    shapes = [
        dict.fromkeys(
            range(tensor.dim()) if dynamic is None else dynamic[name], torch.export.Dim.AUTO
        )
        for name, tensor in tensors.items()
    ]
    try:
        with _patched_forward(module, flat_forward), evaluation_mode(module), torch.no_grad():
            exported = torch.export.export(
                module,
                tuple(tensors.values()),
                dynamic_shapes=(tuple(shapes),),
                strict=False,
                # Guards fix the dimensions that the module fixes; where the caller says which may
                # vary, a guard on them would only be in the way of a captured cache.
                prefer_deferred_runtime_asserts_over_guards=dynamic is not None,
            )
    except _ModelError as error:
        raise CaptureError(_explain(error.__cause__ or error)) from error.__cause__
    except Exception as error:
        raise CaptureError(_explain(error)) from error
    if len(exported.graph_signature.user_outputs) != counts[-1]:
        raise CaptureError(
            f"a forward hook on {type(module).__name__} itself changes what it returns, which a "
            "capture cannot follow. Remove the hook, or put its work into forward."
        )
    facts = size_facts(exported)
    traced: Any = exported.module(check_guards=False)
    return *_clean(traced, list(tensors), module), facts


class _ModelError(Exception):
    """Carries what the model raised through torch.export, which prints the graph it had so far.

    The graph is hung on the exception; this one does not take it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "partial_fx_graph":
            super().__setattr__(name, value)


@contextlib.contextmanager
def _patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    had_own = "forward" in module.__dict__
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if had_own:
            module.forward = own  # type: ignore[assignment]
        else:
            del module.forward


def _explain(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    first = re.sub(r"\s+", " ", text.split("\n\n")[0])[:400]
    frames = traceback.extract_tb(error.__traceback__)
    source = [f for f in frames if not f.filename.startswith((*_NOT_THE_MODEL, "<"))]
    where = f" (in {source[-1].name}, line {source[-1].lineno})" if source else ""
    data_dependent = (
        "data-dependent" in text.lower() or "GuardOnDataDependent" in type(error).__name__
    )
    advice = (
        "The model branches on the values of a tensor. Replace the Python `if`/loop by "
        "torch.where or a mask, or wrap the part without the branch."
        if data_dependent
        else "Check that model(**inputs) runs, that its Python control flow does not depend on "
        "tensor values, and that it calls torch operators only."
    )
    problem = f"{type(error).__name__}: {first}"
    return f"torch.export could not capture the model{where}: {problem}. {advice}"


# --- cleaning -------------------------------------------------------------------------------


def _clean(
    traced: GraphModule, names: list[str], module: nn.Module
) -> tuple[GraphModule, dict[str, str]]:
    graph = traced.graph
    _inline_regions(traced)
    _refuse_higher_order(graph)
    for node in list(graph.nodes):
        if node.op == "call_module" or node.target in _ASSERTIONS:
            graph.erase_node(node)
    _flatten_calling_convention(graph, names)
    _record_module_paths(graph)
    graph.eliminate_dead_code(has_effect)
    take_any_dtype(graph)
    _refuse_state(graph)
    graph_module, aliases = _adopt_weights(traced, module)
    compute_parametrized_weights(graph_module)
    held = {name for name, _ in named_tensors(graph_module)}
    return graph_module, {alias: name for alias, name in aliases.items() if name in held}


def _refuse_higher_order(graph: Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                f"the model calls {node.target} (torch.cond, a scan, vmap and their like), which "
                "keeps a graph inside the graph that no pass could look into. Compute it by "
                "ordinary operators: torch.where, a mask, broadcasting."
            )


def _refuse_state(graph: Graph) -> None:
    for node in graph.nodes:
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            written = _viewed(node)
            if written.op == "get_attr":
                raise CaptureError(
                    f"the model writes to its own tensor {written.target!r} ({node.target}); a "
                    "program holds no state. Return the new value as an output."
                )


def _viewed(node: Node) -> Node:
    """The tensor whose memory a node returns."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        if not returns or returns[0].alias_info is None:
            break
        node = node.args[0]
    return node


def _inline_regions(traced: GraphModule) -> None:
    """Replace `wrap_with_*` regions by their bodies; nothing here trains or autocasts."""
    graph = traced.graph
    while regions := [node for node in graph.nodes if node.target in _REGION_CALLS]:
        for node in regions:
            start = next(
                i
                for i, arg in enumerate(node.args)
                if isinstance(arg, Node) and arg.op == "get_attr"
            )
            body = traced.get_submodule(str(node.args[start].target))
            assert isinstance(body, GraphModule)  # noqa: S101 - by the operator's contract
            inner = dict(
                zip(
                    (n for n in body.graph.nodes if n.op == "placeholder"),
                    node.args[start + 1 :],
                    strict=True,
                )
            )
            with graph.inserting_before(node):
                results = graph.graph_copy(body.graph, inner)  # type: ignore[arg-type]
            if isinstance(results, Node):
                results = (results,)
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
                graph.erase_node(user)
            graph.erase_node(node)


def _flatten_calling_convention(graph: Graph, names: list[str]) -> None:
    graph.set_codegen(CodeGen())
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    wanted = [re.sub(r"\W", "_", name) for name in names]
    for node in graph.nodes:
        if node.name in wanted:  # a buffer may have an input's name; the input keeps it
            node._rename(f"{node.name}_taken")  # pyright: ignore[reportPrivateUsage]
    for node, name in zip(placeholders, wanted, strict=True):
        node.name = node.target = name
        node.meta["module_path"] = ""


def _record_module_paths(graph: Graph) -> None:
    """Keep the deepest module path of each node; drop the rest of the export's metadata."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        path = str(list(stack.values())[-1][0]) if stack else ""
        if path.startswith("_empty_nn_module_stack"):
            path = ""  # a marker of the tracer, not a module
        kept = {key: node.meta[key] for key in ("val",) if key in node.meta}
        node.meta = {**kept, "module_path": path, "from_node": []}


def _adopt_weights(traced: GraphModule, module: nn.Module) -> tuple[GraphModule, dict[str, str]]:
    """Give the graph its own weight tree, in which a tied tensor is held once."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named_tensors(module):
        key = _identity(tensor)
        if key in first:
            aliases[name] = first[key]
        first.setdefault(key, name)
    root = WeightTree()
    nodes: dict[str, Node] = {}
    for node in [n for n in traced.graph.nodes if n.op == "get_attr"]:
        tensor = operator.attrgetter(str(node.target))(traced)
        if not isinstance(tensor, Tensor):
            continue
        name = first.get(_identity(tensor), f"{CONSTANTS}{node.target}")
        if name in nodes:
            node.replace_all_uses_with(nodes[name])
            traced.graph.erase_node(node)
            continue
        nodes[name] = node
        node.target = name
        node.meta["module_path"] = name.rpartition(".")[0]
        assign_weight(root, name, tensor)
    graph_module = GraphModule(root, traced.graph, class_name="FxoptGraph")
    graph_module.eval()
    return graph_module, {alias: name for alias, name in aliases.items() if name in nodes}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.untyped_storage().data_ptr() or id(tensor),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
    )


# --- dimensions -----------------------------------------------------------------------------


def readable_dimensions(
    graph: Graph, preferred: dict[str, tuple[str | None, ...]], shared: tuple[str, ...] = ()
) -> dict[str, str]:
    """Names for the symbols in a graph: those asked for, then `dim0`, `dim1`, ...

    `preferred` maps an input's name to the names wanted for its axes. Two symbols get the same
    name only if it is in `shared`: they are equal whatever the tracer could prove.
    """
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "placeholder" or not isinstance(node.meta.get("val"), Tensor):
            continue
        wanted = preferred.get(node.name, ())
        for axis, size in enumerate(node.meta["val"].shape):
            symbol = str(size)
            if isinstance(size, int) or not symbol.isidentifier() or symbol in names:
                continue
            name = wanted[axis] if axis < len(wanted) else None
            taken = name in names.values() and name not in shared
            names[symbol] = f"dim{len(names)}" if name is None or taken else name
    return names


def dimensions(value: Any, names: dict[str, str]) -> tuple[Dimension, ...]:
    """The shape of a fake tensor with its symbols under readable names."""
    return tuple(
        int(size)
        if isinstance(size, int) or str(size).isdigit()
        else re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), str(size))
        for size in value.shape
    )


def example_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies, so that neither the export nor a check writes to the user's tensors."""
    return {
        name: copy.copy(tensor.detach().clone().contiguous()) for name, tensor in tensors.items()
    }
