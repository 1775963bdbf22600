"""Where a wrong rewrite begins: the first diverging node, and the site it belongs to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.execution import promote, run_float64
from fxopt.ir.program import Program, Site, module_path
from fxopt.passes.base import PassResult
from fxopt.pipeline.measure import Inputs, max_error, real_parts
from fxopt.pipeline.tolerances import EQUIVALENT_FLOAT64


@dataclass(frozen=True)
class Divergence:
    """The first node from which a difference reaches the failing output."""

    node: str
    path: str
    target: str
    before: float
    after: float
    error: float

    def __str__(self) -> str:
        if not self.node:
            return "Every node that both programs share agrees; the change is at the output itself."
        where = f" in {self.path}" if self.path else ""
        return (
            f"First diverging node: {self.node} ({self.target}){where}, where the largest "
            f"difference is {self.before:.6g} before and {self.after:.6g} after."
        )


def first_divergence(
    before: Program, after: Program, inputs: Inputs, inputs_after: Inputs, output: int
) -> Divergence:
    """Find where a wrong rewrite begins.

    Nodes of the same name are compared. A correct rewrite may change values between two
    places (a folded scale, say) as long as they agree again further on, so only differences
    from which a path of differences leads to the failing output count.
    """
    seen: dict[str, Tensor] = {}

    def remember(node: Node, value: Any) -> None:
        if isinstance(value, Tensor) and node.op == "call_function":
            seen[node.name] = value

    run_float64(before, inputs, remember)
    differing: dict[str, Divergence] = {}

    def compare(node: Node, value: Any) -> None:
        old = seen.get(node.name)
        if old is None or not isinstance(value, Tensor) or old.shape != value.shape:
            return
        error = max_error(value, old)
        if not error <= EQUIVALENT_FLOAT64:
            differing[node.name] = _divergence(node, old, value, error)

    run_float64(after, inputs_after, compare)
    results: Any = after.graph.output_node().args[0]
    reached = _upstream_differing(results[output], differing, set(seen))
    for node in after.graph.nodes:
        if node in reached and node.name in differing:
            return differing[node.name]
    return Divergence("", "", "", 0.0, 0.0, 0.0)


def _divergence(node: Node, old: Tensor, new: Tensor, error: float) -> Divergence:
    a, b = (real_parts(promote(value)).flatten() for value in (old, new))
    index = int((a - b).abs().nan_to_num(torch.inf).argmax()) if a.is_floating_point() else 0
    return Divergence(
        node.name, module_path(node), str(node.target), float(a[index]), float(b[index]), error
    )


def _upstream_differing(
    output: Any, differing: dict[str, Divergence], compared: set[str]
) -> set[Node]:
    reached: set[Node] = set()
    stack = [output] if isinstance(output, Node) else []
    while stack:
        node = stack.pop()
        if node in reached or (node.name in compared and node.name not in differing):
            continue
        reached.add(node)
        stack.extend(node.all_input_nodes)
    return reached


def guilty_site(found: Divergence, result: PassResult, after: Program) -> Site | None:
    """The site that a divergence belongs to: by node, then by the closest module path."""
    if len(result.sites) == 1:
        return result.sites[0]
    by_node = {site.node: site for site in result.sites if site.node}
    node = next((n for n in after.graph.nodes if n.name == found.node), None)
    if node is not None:
        if node.name in by_node:
            return by_node[node.name]
        for origin in reversed(node.meta.get("from_node", [])):
            if origin["node"] in by_node:
                return by_node[origin["node"]]
        for source in [node, *node.all_input_nodes]:
            for near in [source, *source.all_input_nodes]:
                if near.name in by_node:
                    return by_node[near.name]
    return _closest_path(found.path, result)


def _closest_path(path: str, result: PassResult) -> Site | None:
    parts = path.split(".")

    def common(site: Site) -> int:
        count = 0
        for a, b in zip(parts, site.path.split("."), strict=False):
            if a != b:
                break
            count += 1
        return count

    best = max(result.sites, key=common, default=None)
    return best if best is not None and path and common(best) > 0 else None
