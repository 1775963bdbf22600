"""OptimizedModel: what `fxopt.optimize` returns and `fxopt.load` brings back."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxopt.errors import InputError, LoweringError
from fxopt.ir.program import Program
from fxopt.ir.runner import Runner
from fxopt.ir.structure import unflatten
from fxopt.ir.text import format_program
from fxopt.runtime.calling import bind_structured
from fxopt.runtime.folder import write_folder
from fxopt.runtime.original_weights import original_weights


class OptimizedModel(nn.Module):
    """Behaves like the model that went in: same call, same result type.

    Attributes:
        program: the rewritten graph with its weights and history, before lowering.
        lowered: the program that runs.
        report: what each pass did and what it cost.
        recipe: the resolved recipe, as plain data.
    """

    def __init__(
        self,
        program: Program,
        lowered: Program,
        *,
        report: Any = None,
        recipe: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        relower: Callable[[Program, torch.device], tuple[Program, Program]] | None = None,
    ) -> None:
        super().__init__()
        self.lowered = lowered
        self.program = program
        self.extra = dict(extra or {})
        self.runner: nn.Module
        self._install()
        self.report = report
        self.recipe = dict(recipe or {})
        self._relower = relower
        self.eval()

    def _install(self) -> None:
        """Make the lowered program what runs; called again whenever it changes."""
        self.runner = self._compiled(Runner(self.lowered.graph_module))

    def _compiled(self, runner: Runner) -> nn.Module:
        """The runner as the recipe's lowering wants it: as it is, or through torch.compile."""
        if self.extra.get("lowering", {}).get("compile") != "inductor":
            return runner
        return torch.compile(runner, dynamic=True)  # type: ignore[return-value]

    def _apply(self, fn: Any, recurse: bool = True) -> "OptimizedModel":
        """What `.half()`, `.cuda()` or a parent's `.to` do to every tensor goes through `.to`."""
        del recurse
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        return self.to(device=moved.device, dtype=moved.dtype)

    # --- running ----------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program on what the model would take.

        Raises:
            InputError: the inputs do not fit the captured signature.
        """
        tensors = bind_structured(self.signature, args, kwargs)
        return unflatten(self.signature.output_structure, self.run_flat(tensors))

    def run_flat(self, tensors: list[Tensor]) -> list[Tensor]:
        """The graph on flat tensors; flat outputs, cache last."""
        self.signature.check(tensors)
        return run_graph(self.runner, tensors)

    # --- reading ----------------------------------------------------------------------------

    @property
    def signature(self) -> Any:
        """What the program takes and returns."""
        return self.lowered.signature

    @property
    def graph(self) -> Graph:
        """The rewritten graph, before lowering to kernels."""
        return self.program.graph

    @property
    def graph_module(self) -> GraphModule:
        """The rewritten graph as a module, before lowering to kernels."""
        return self.program.graph_module

    def print_graph(self, lowered: bool = False) -> None:
        """Print the rewritten graph in its readable form."""
        print(format_program(self.lowered if lowered else self.program))

    def explain(self, path: str) -> str:
        """What happened to one module of the original model, pass by pass."""
        if self.report is None:
            raise InputError("this model carries no report; it was not made by fxopt.optimize.")
        return self.report.explain(path)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.lowered.weights().values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the model's results and activations."""
        for spec in self.lowered.signature.outputs:
            if spec.dtype.is_floating_point:
                return spec.dtype
        return torch.get_default_dtype()

    def byte_count(self) -> int:
        """Bytes of the weights that run."""
        return self.lowered.byte_count()

    # --- weights ----------------------------------------------------------------------------

    def state_dict(  # type: ignore[override]
        self,
        *,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """Weights and scales by their dotted names; tied names are all listed.

        Args:
            destination: where to put them; a module that holds this one passes its own.
            prefix: put before each name.
            keep_vars: hand out parameters as they are, not detached.
        """
        into: dict[str, Any] = {} if destination is None else destination
        for name, value in self._named_weights().items():
            into[prefix + name] = value if keep_vars else value.detach()
        return into

    def _named_weights(self) -> dict[str, Tensor]:
        weights = self.program.weights()
        aliases = self.program.aliases.items()
        return {**weights} | {alias: weights[name] for alias, name in aliases if name in weights}

    def state_dict_for(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights with which the untouched original computes what this model does.

            fresh = type(model)(model.config)
            fresh.load_state_dict(optimized.state_dict_for(fresh))

        The entries have the names, shapes and dtypes of `model.state_dict()`. Those that the
        program does not hold are `model`'s own; the others share memory with this model.

        Raises:
            StateDictError: a pass did more than change the model's weights, or `model` is another.
        """
        return original_weights(self.program, model)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Refused: the lowered program holds packed copies of its weights."""
        del state_dict, strict, assign
        raise _refuse_state()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """What `load_state_dict` of a module that holds this one calls; that may leave it out."""
        del local_metadata, strict, unexpected_keys, error_msgs
        if any(name.startswith(prefix) for name in state_dict):
            raise _refuse_state()
        missing_keys += [prefix + name for name in self._named_weights()]

    def to(self, *args: Any, **kwargs: Any) -> "OptimizedModel":
        """Move to a device; the program is lowered again for it.

        Raises:
            LoweringError: a dtype was asked for; convert the model before optimizing.
        """
        parse: Any = torch._C._nn  # type: ignore[attr-defined]  # pyright: ignore
        device, dtype, _, _ = parse._parse_to(*args, **kwargs)
        if dtype is not None and dtype != self.dtype:
            raise LoweringError(
                f"the program computes in {self.dtype}; to run in {dtype}, convert the original "
                "model with .to(dtype) and optimize it again."
            )
        if device is not None and torch.device(device) != self.device:
            if self._relower is None:
                raise LoweringError("this model was put together without a lowering to repeat.")
            self.program, self.lowered = self._relower(self.program, device)
            self._install()
        return self

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write config, weights, graph, recipe and report to a folder that `fxopt.load` reads.

        Raises:
            SaveError: the folder holds something else, or cannot be written.
        """
        del kwargs
        write_folder(
            save_directory,
            self.program,
            config=self._config_dict(),
            generation_config=self._generation_config_dict(),
            recipe=self.recipe,
            report={} if self.report is None else self.report.to_dict(),
            extra=self.extra,
        )

    def _config_dict(self) -> dict[str, Any] | None:
        return None

    def _generation_config_dict(self) -> dict[str, Any] | None:
        return None

    def extra_repr(self) -> str:
        """Inputs and bytes, for print(model)."""
        inputs = ", ".join(spec.name for spec in self.signature.inputs[:4])
        return f"inputs=({inputs}), bytes={self.byte_count():,}"


def run_graph(graph: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flat outputs, without gradients and without autocast: the program's dtypes were verified."""
    kind = tensors[0].device.type if tensors else "cpu"
    # Entering autocast takes microseconds, which a decoding step should not pay for nothing.
    active = torch.is_autocast_enabled(kind)
    autocast = torch.autocast(kind, enabled=False) if active else contextlib.nullcontext()
    with torch.no_grad(), autocast:
        return list(graph(*tensors))


def _refuse_state() -> LoweringError:
    return LoweringError(
        "an optimized model does not load another state dict: its kernels hold weights packed for "
        "them. Load the state into the original model and optimize that; of a module that holds an "
        "optimized model, load the rest with strict=False."
    )
