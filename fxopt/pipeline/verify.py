"""Check what a pass did: equivalence in float64, or the decibels it cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.analysis.execution import promote, run, run_float64
from fxopt.errors import NotEquivalentError, QualityFloorError
from fxopt.ir.program import Program, Site, module_path
from fxopt.passes.base import Exactness, Pass, PassResult
from fxopt.pipeline.tolerances import EQUIVALENT_FLOAT64, NOISE_FLOOR, NOISE_SLACK

Inputs = Sequence[Tensor]


@dataclass
class Measurement:
    """How far outputs moved: over all outputs, and for logits in the words of their users."""

    sqnr_db: float = math.inf
    relative_error: float = 0.0
    worst_output: str = ""
    kl: float | None = None
    top1: float | None = None
    outputs: dict[str, float] = field(default_factory=dict[str, float])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "sqnr_db": _finite(self.sqnr_db),
            "relative_error": self.relative_error,
            "worst_output": self.worst_output,
            "kl": self.kl,
            "top1": self.top1,
            "outputs": {name: _finite(db) for name, db in self.outputs.items()},
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Floor:
    """What a lossy pass may cost at most; None means no limit."""

    sqnr_db: float | None = None
    top1: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Verifier:
    """Judges passes on a fixed set of inputs.

    Attributes:
        inputs: flat inputs on which programs are compared.
        masks: per input set, the entries of each output that belong to real tokens.
        mode: "full", "fast" (one input set, the model's own dtype) or "off".
        floor: the recipe's floor for lossy passes.
    """

    inputs: Sequence[Inputs]
    mode: str = "full"
    floor: Floor = Floor()

    def judge(
        self, a_pass: Pass, before: Program, after: Program, result: PassResult
    ) -> dict[str, Any]:
        """Compare a program before and after a pass.

        Returns:
            what was measured, for the report.

        Raises:
            NotEquivalentError: an EQUIVALENT pass changed the function.
            QualityFloorError: an APPROXIMATE pass cost more than the floor.
        """
        if self.mode == "off" or unchanged(before, after):
            return {"mode": "off" if self.mode == "off" else "nothing changed"}
        if a_pass.exactness is Exactness.APPROXIMATE:
            return self._judge_approximate(a_pass, before, after, result)
        return self._judge_equivalent(a_pass, before, after, result)

    # --- equivalent -------------------------------------------------------------------------

    def _judge_equivalent(
        self, a_pass: Pass, before: Program, after: Program, result: PassResult
    ) -> dict[str, Any]:
        worst64, worst_own = 0.0, 0.0
        chosen = self.inputs if self.mode == "full" else self.inputs[:1]
        for inputs in chosen:
            reference = run_float64(before, inputs)
            if self.mode == "full":
                outputs = run_float64(after, inputs)
                error, index = worst_error(outputs, reference)
                if not error <= EQUIVALENT_FLOAT64:
                    raise self._not_equivalent(a_pass, before, after, result, inputs, index, error)
                worst64 = max(worst64, error)
            worst_own = max(
                worst_own, self._own_dtype(a_pass, before, after, inputs, reference, result)
            )
        measured = {"mode": self.mode, "inputs": len(chosen), "error_own_dtype": worst_own}
        return measured | ({"error_float64": worst64} if self.mode == "full" else {})

    def _own_dtype(
        self,
        a_pass: Pass,
        before: Program,
        after: Program,
        inputs: Inputs,
        reference: list[Tensor],
        result: PassResult,
    ) -> float:
        old, new = run(before, inputs), run(after, inputs)
        worst = 0.0
        for index, (a, b, exact) in enumerate(zip(old, new, reference, strict=True)):
            if not a.is_floating_point():
                continue
            noise = rms_error(promote(a), exact)
            noise_after = rms_error(promote(b), exact)
            allowed = NOISE_SLACK * max(noise, NOISE_FLOOR.get(a.dtype, 0.0))
            if not noise_after <= allowed:
                raise self._not_equivalent(
                    a_pass, before, after, result, inputs, index, noise_after, own_dtype=True
                )
            worst = max(worst, noise_after)
        return worst

    def _not_equivalent(
        self,
        a_pass: Pass,
        before: Program,
        after: Program,
        result: PassResult,
        inputs: Inputs,
        output: int,
        error: float,
        own_dtype: bool = False,
    ) -> NotEquivalentError:
        found = first_divergence(before, after, inputs, output)
        site = guilty_site(found, result, after)
        name = before.signature.outputs[output].name
        dtype = str(before.signature.outputs[output].dtype)[6:] if own_dtype else "float64"
        allowed = "the original's own noise" if own_dtype else f"{EQUIVALENT_FLOAT64:g}"
        shapes = [list(tensor.shape) for tensor in inputs[:2]]
        return NotEquivalentError(
            f"pass {a_pass.name!r} promised an equivalent program and changed output {name!r} by "
            f"{error:.3g} of its rms in {dtype} (allowed {allowed}; inputs of shape {shapes}). "
            f"{_describe_site(site)} {found} The program is as it was before the pass."
        )

    # --- approximate ------------------------------------------------------------------------

    def _judge_approximate(
        self, a_pass: Pass, before: Program, after: Program, result: PassResult
    ) -> dict[str, Any]:
        chosen = self.inputs if self.mode == "full" else self.inputs[:1]
        measured = measure(before, after, chosen)
        layers = layer_decibels(before, after, chosen[0], result)
        problems: list[str] = []
        floor = self.floor
        if floor.sqnr_db is not None and measured.sqnr_db < floor.sqnr_db:
            problems.append(f"SQNR {measured.sqnr_db:.1f} dB (floor {floor.sqnr_db:g} dB)")
        if floor.top1 is not None and measured.top1 is not None and measured.top1 < floor.top1:
            problems.append(f"top-1 agreement {measured.top1:.3f} (floor {floor.top1:g})")
        if floor.kl is not None and measured.kl is not None and measured.kl > floor.kl:
            problems.append(f"KL {measured.kl:.3g} (at most {floor.kl:g})")
        if problems:
            raise QualityFloorError(
                f"pass {a_pass.name!r} cost more than the recipe allows at output "
                f"{measured.worst_output!r}: {'; '.join(problems)}. Exclude sensitive layers, use "
                "finer granularity, or lower the floor. The program is as it was before the pass."
            )
        return {"mode": self.mode, "inputs": len(chosen)} | measured.to_dict() | {"layers": layers}


def unchanged(before: Program, after: Program) -> bool:
    """Whether two programs are the same graph over the same tensors."""

    def outline(program: Program) -> list[tuple[str, ...]]:
        nodes = program.graph.nodes
        return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in nodes]

    mine, theirs = before.weights(), after.weights()
    same_tensors = mine.keys() == theirs.keys() and all(
        mine[name].data_ptr() == theirs[name].data_ptr() for name in mine
    )
    return same_tensors and outline(before) == outline(after)


def _describe_site(site: Site | None) -> str:
    if site is None:
        return "No single site could be named."
    return f"Guilty site: {site.path or '(model)'} ({site.detail})."


# --- measures -------------------------------------------------------------------------------


def rms_error(a: Tensor, b: Tensor) -> float:
    """rms(a - b) / rms(b) over the finite entries; inf where only one of them is finite."""
    if b.numel() == 0:
        return 0.0
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return math.inf
    difference = torch.where(finite, a - b, 0.0)
    scale = float(torch.where(finite, b, 0.0).square().mean().sqrt())
    return float(difference.square().mean().sqrt()) / max(scale, 1e-30)


def max_error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / rms(b); integers must be equal."""
    if b.numel() == 0:
        return 0.0
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    finite = torch.isfinite(b)
    if a.shape != b.shape or not torch.equal(finite, torch.isfinite(a)):
        return math.inf
    scale = float(torch.where(finite, b, 0.0).square().mean().sqrt())
    return float(torch.where(finite, a - b, 0.0).abs().max()) / max(scale, 1e-30)


def worst_error(outputs: list[Tensor], reference: list[Tensor]) -> tuple[float, int]:
    """The largest `max_error` over outputs, and which output has it."""
    errors = [max_error(a, b) for a, b in zip(outputs, reference, strict=True)]
    worst = max(range(len(errors)), key=lambda i: errors[i])
    return errors[worst], worst


def measure(before: Program, after: Program, inputs: Sequence[Inputs]) -> Measurement:
    """SQNR, relative error and, for logits, KL and top-1 agreement over all inputs.

    SQNR = 10 log10(sum y^2 / sum (y - y')^2), the smallest over the outputs that are not state.
    """
    specs = before.signature.outputs
    count = len(specs) - (2 * before.signature.cache.layers if before.signature.cache else 0)
    signal, noise = [0.0] * count, [0.0] * count
    kls: list[Tensor] = []
    agreements: list[Tensor] = []
    for sample in inputs:
        old, new = run(before, sample), run(after, sample)
        for index in range(count):
            a, b = promote(old[index]), promote(new[index])
            if not a.is_floating_point():
                continue
            signal[index] += float(a.square().sum())
            noise[index] += float((a - b).square().sum())
            if specs[index].name.rpartition(".")[2].endswith("logits") and a.dim() >= 2:
                kls.append(divergence(a, b).flatten())
                agreements.append((a.argmax(-1) == b.argmax(-1)).double().flatten())
    outputs = {
        specs[i].name: 10 * math.log10(signal[i] / noise[i]) if noise[i] > 0 else math.inf
        for i in range(count)
        if signal[i] > 0 or noise[i] > 0
    }
    worst = min(outputs, key=lambda name: outputs[name]) if outputs else ""
    decibels = outputs.get(worst, math.inf)
    return Measurement(
        sqnr_db=decibels,
        relative_error=10 ** (-decibels / 20),
        worst_output=worst,
        kl=float(torch.cat(kls).mean()) if kls else None,
        top1=float(torch.cat(agreements).mean()) if agreements else None,
        outputs=outputs,
    )


def layer_decibels(
    before: Program, after: Program, inputs: Inputs, result: PassResult
) -> dict[str, float | None]:
    """SQNR at each site's own output, errors of the sites before it included, by module path."""
    paths = {site.node: site.path or site.node for site in result.sites if site.node}
    seen: dict[str, Tensor] = {}
    decibels: dict[str, float | None] = {}

    def remember(node: Node, value: Any) -> None:
        if node.name in paths and isinstance(value, Tensor):
            seen[node.name] = value

    def compare(node: Node, value: Any) -> None:
        old = seen.get(node.name)
        if old is None or not isinstance(value, Tensor) or old.shape != value.shape:
            return
        error = rms_error(promote(value), promote(old))
        decibels[paths[node.name]] = -20 * math.log10(error) if error > 0 else None

    run(before, inputs, remember)
    run(after, inputs, compare)
    return decibels


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(softmax(a) || softmax(b)) over the last axis, in nats."""
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# --- attribution ----------------------------------------------------------------------------


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


def first_divergence(before: Program, after: Program, inputs: Inputs, output: int) -> Divergence:
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

    run_float64(after, inputs, compare)
    results: Any = after.graph.output_node().args[0]
    reached = _upstream_differing(results[output], differing, set(seen))
    for node in after.graph.nodes:
        if node in reached and node.name in differing:
            return differing[node.name]
    return Divergence("", "", "", 0.0, 0.0, 0.0)


def _divergence(node: Node, old: Tensor, new: Tensor, error: float) -> Divergence:
    a, b = promote(old).flatten(), promote(new).flatten()
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
