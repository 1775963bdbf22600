"""The text form of a program: stable, readable, the same whatever its nodes are called.

    program at level CANONICAL
      takes   %input_ids: i64[batch, sequence]
      returns last_hidden_state: f32[batch, sequence, 384]

    %0 = aten.embedding.default("embeddings.word_embeddings.weight", %input_ids, 0)
       : f32[batch, sequence, 384]  # embeddings.word_embeddings
    return %0

Weights stand in quotes under their dotted names, values are numbered in the order of the graph,
inputs and sizes carry the names of the signature.
"""

from typing import Any

import torch
from sympy import Symbol
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from fxopt.ir.program import Program, module_path
from fxopt.ir.signature import TensorSpec

SHORT_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def format_program(program: Program, *, weights: bool = False, types: bool = True) -> str:
    """The text form of a program.

    Args:
        program: what to print.
        weights: add a table of the weights and of the names tied to them.
        types: add each value's dtype and shape, where they are recorded.
    """
    return _Printer(program, types).text(weights)


def format_type(dtype: torch.dtype, shape: Any) -> str:
    """`f32[2, sequence, 576]`."""
    name = SHORT_DTYPES.get(dtype, str(dtype).removeprefix("torch."))
    return f"{name}[{', '.join(str(size) for size in shape)}]"


def operator_name(target: Any) -> str:
    """A call's target with its namespace: `aten.linear.default`, `operator.mul`."""
    if isinstance(target, OpOverload):
        return str(target)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"
    module = str(getattr(target, "__module__", "")).removeprefix("_")
    name = str(getattr(target, "__name__", target))
    return f"{module}.{name}" if module not in ("", "builtins") else name


class _Printer:
    """Numbers the values of one program and prints them."""

    def __init__(self, program: Program, types: bool) -> None:
        self.program = program
        self.types = types
        self.symbols = size_names(program)
        self.names: dict[Node, str] = {}
        inputs = iter(program.signature.inputs)
        calls = 0
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec = next(inputs, None)
                self.names[node] = f"%{spec.name if spec else node.target}"
            elif node.op == "get_attr":
                self.names[node] = f'"{node.target}"'
            else:
                self.names[node] = f"%{calls}"
                calls += 1

    def text(self, weights: bool) -> str:
        lines = [f"program at level {self.program.level.name}"]
        signature = self.program.signature
        lines += _column("takes", [f"%{_spec(spec)}" for spec in signature.inputs])
        lines += _column("returns", [_spec(spec) for spec in signature.outputs])
        lines.append("")
        for node in self.program.graph.nodes:
            if node.op not in ("placeholder", "get_attr"):
                lines.append(self.line(node))
        if weights:
            lines += ["", *self.weight_table()]
        return "\n".join(lines) + "\n"

    def line(self, node: Node) -> str:
        if node.op == "output":
            return f"return {self.value(node.args[0])}"
        arguments = [self.value(argument) for argument in node.args]
        arguments += [f"{name}={self.value(value)}" for name, value in node.kwargs.items()]
        target = node.target if isinstance(node.target, str) else operator_name(node.target)
        text = f"{self.names[node]} = {target}({', '.join(arguments)})"
        if self.types and node.meta.get("val") is not None:
            text += f" : {self.type(node.meta['val'])}"
        path = module_path(node)
        return f"{text}  # {path}" if path else text

    def value(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, list | tuple):
            inside = ", ".join(self.value(item) for item in value)
            if isinstance(value, list):
                return f"[{inside}]"
            return f"({inside},)" if len(value) == 1 else f"({inside})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.value(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            parts = [value.start, value.stop, *([] if value.step is None else [value.step])]
            return ":".join("" if part is None else self.value(part) for part in parts)
        if isinstance(value, torch.dtype):
            return SHORT_DTYPES.get(value, str(value))
        return repr(value) if not isinstance(value, torch.device) else str(value)

    def type(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return format_type(value.dtype, [self.size(size) for size in value.shape])
        if isinstance(value, list | tuple):
            return f"({', '.join(self.type(item) for item in value)})"
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.size(value)
        return type(value).__name__

    def size(self, size: Any) -> str:
        return format_size(size, self.symbols)

    def weight_table(self) -> list[str]:
        rows = [
            f'  "{name}": {format_type(tensor.dtype, tensor.shape)}'
            for name, tensor in sorted(self.program.weights().items())
        ]
        rows += [f'  "{a}" = "{name}"' for a, name in sorted(self.program.aliases.items())]
        return ["weights", *rows]


def size_names(program: Program) -> dict[str, str]:
    """The signature's names for the symbols in a graph's recorded shapes."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    names: dict[str, str] = {}
    for node, spec in zip(placeholders, program.signature.inputs, strict=False):
        recorded = node.meta.get("val")
        if not isinstance(recorded, Tensor):
            continue
        for size, dimension in zip(recorded.shape, spec.shape, strict=False):
            symbol = str(size)
            if symbol.isidentifier() and isinstance(dimension, str) and dimension.isidentifier():
                names.setdefault(symbol, dimension)
    return names


def format_size(size: Any, names: dict[str, str]) -> str:
    """A size with its symbols under readable names; nameless ones are numbered as they come."""
    symbolic = getattr(size, "node", None)
    if symbolic is None:
        return str(size)
    expression: Any = symbolic.expr
    renamed = {
        # Sums are printed in the order of the names, whatever the symbols were called.
        symbol: Symbol(names.setdefault(str(symbol), f"size{len(names)}"), integer=True)
        for symbol in sorted(expression.free_symbols, key=str)
    }
    return str(expression.xreplace(renamed))


def _spec(spec: TensorSpec) -> str:
    return f"{spec.name}: {format_type(spec.dtype, spec.shape)}"


def _column(label: str, rows: list[str]) -> list[str]:
    return [f"  {label if i == 0 else '':8}{row}" for i, row in enumerate(rows or ["nothing"])]
