"""How sharply the loss bends in the weights of linears: traces and largest eigenvalues of Hessians.

    H v = d(g . v) / dw,   g = d loss / dw
    trace(H) = E_z[z . H z],  z uniform in {-1, 1};     v <- H v / ||H v||,  lambda = v . H v

Shapes: w, z and v [out, in] of one linear; H is never formed. The loss is the distance of the
    output from what the model gives today (see output_error), which is least there: H has no
    negative eigenvalue and needs no labels.
Source: Yao et al., PyHessian, 2020, arXiv:1912.07145; Dong et al., HAWQ-V2: Hessian Aware
    trace-Weighted Quantization of Neural Networks, NeurIPS 2020, arXiv:1911.03852 (trace); Dong et
    al., HAWQ, ICCV 2019, arXiv:1905.03696 (largest eigenvalue).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxopt.analysis.output_error import is_logits, judged_outputs
from fxopt.analysis.samples import RealTokens, Sample
from fxopt.ir.operators.registration import REFERENCES
from fxopt.ir.program import Program

# Products of the Hessian with one tensor for each weight.
Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def hutchinson_traces(
    product: Product, like: Sequence[Tensor], probes: int, generator: torch.Generator
) -> list[float]:
    """The trace of each weight's own block of the Hessian, estimated for all of them at once.

    What lies between two weights has mean zero, as their probes are independent.
    """
    totals = [0.0] * len(like)
    for _ in range(probes):
        signs = [_signs(tensor, generator) for tensor in like]
        for index, (z, hz) in enumerate(zip(signs, product(signs), strict=True)):
            totals[index] += float((z * hz).sum()) / probes
    return totals


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    iterations: int,
    generator: torch.Generator,
    tolerance: float = 1e-3,
) -> float:
    """The eigenvalue of largest magnitude, by power iteration until it stands still."""
    v = torch.randn(like.shape, generator=generator).to(like)
    v = v / v.norm()
    found = 0.0
    for _ in range(iterations):
        hv = product(v)
        before, found = found, float((v * hv).sum())
        size = hv.norm()
        if float(size) == 0 or abs(found - before) <= tolerance * abs(found):
            break
        v = hv / size
    return found


def traces(
    program: Program,
    samples: Sequence[Sample],
    linears: Sequence[Node],
    probes: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[float]:
    """The trace of the loss's Hessian in the weight of each linear, mean over samples."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(len(linears), dtype=torch.float64)
    for number, sample in enumerate(samples):
        progress(f"Hessian traces, batch {number + 1}/{len(samples)}")
        loss = Loss(program, sample, linears)
        found += torch.tensor(hutchinson_traces(loss.product, loss.weights, probes, generator))
    return (found / max(len(samples), 1)).tolist()


def eigenvalues(
    program: Program,
    samples: Sequence[Sample],
    linears: Sequence[Node],
    iterations: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[float]:
    """|mean| + standard deviation over samples of the largest eigenvalue for each linear."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(len(samples), len(linears), dtype=torch.float64)
    for row, sample in enumerate(samples):
        for column, linear in enumerate(linears):
            progress(f"eigenvalue of {linear.name}, batch {row + 1}/{len(samples)}")
            loss = Loss(program, sample, [linear])
            found[row, column] = largest_eigenvalue(
                lambda v, p=loss.product: p([v])[0], loss.weights[0], iterations, generator
            )
    return (found.mean(0).abs() + found.std(0, correction=0)).tolist()


class Loss:
    """The distance of a program's output from its own, as a function of some weights."""

    def __init__(self, program: Program, sample: Sample, linears: Sequence[Node]) -> None:
        values = [program.weight(str(linear.args[1].target)) for linear in linears]  # type: ignore[union-attr]
        self.weights = [_wide(value.detach()).requires_grad_() for value in values]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            own = dict(zip(linears, self.weights, strict=True))
            outputs = _Differentiable(program, own).run(*sample.inputs)
            loss = torch.zeros(())
            (results,), real = program.graph.output_node().args, RealTokens(program)
            for index in judged_outputs(program):
                y = real.rows(results[index], outputs[index], sample)  # type: ignore[index]
                logits = is_logits(program.signature.outputs[index])
                loss = loss + _distance(y, y.detach(), logits)
            self.gradients = torch.autograd.grad(
                loss, self.weights, create_graph=True, materialize_grads=True
            )

    def product(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The Hessian times one tensor for each weight."""
        inner = torch.stack(
            [(g * v).sum() for g, v in zip(self.gradients, vectors, strict=True)]
        ).sum()
        return torch.autograd.grad(inner, self.weights, retain_graph=True, materialize_grads=True)


def _distance(y: Tensor, exact: Tensor, logits: bool) -> Tensor:
    if logits:
        p, q = exact.log_softmax(-1), y.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()
    return (y - exact).square().sum() / exact.square().sum().clamp(min=1e-30)


class _Differentiable(Interpreter):
    """Runs a program in at least float32, so that gradients reach the weights of some linears."""

    def __init__(self, program: Program, weights: Mapping[Node, Tensor]) -> None:
        super().__init__(program.graph_module)
        self.weights = weights

    def run_node(self, n: Node) -> Any:
        weight = self.weights.get(n)
        if weight is None:
            return super().run_node(n)
        args = map_aggregate(self.fetch_args_kwargs_from_env(n)[0], _wide)
        return n.target(args[0], weight, *args[2:])  # type: ignore[operator, index]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = map_aggregate(args, _wide), map_aggregate(kwargs, _wide)
        call = REFERENCES.get(target) or target
        return call(*args, **kwargs)


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_wide(value.dtype))
    narrow = (torch.bfloat16, torch.float16)
    return torch.float32 if isinstance(value, torch.dtype) and value in narrow else value


def _signs(tensor: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    return signs.to(tensor)
