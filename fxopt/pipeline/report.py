"""Report: what was done to a model, where not and why, what it cost, and what runs now."""

import difflib
import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from fxopt.errors import InputError, LoadError, SaveError
from fxopt.ir.program import PassRecord, Program, bytes_held, module_path
from fxopt.kernels import native_status
from fxopt.lowering import Lowered
from fxopt.pipeline.recipe import Recipe
from fxopt.runtime.stored_graph import versions

WHOLE_MODEL = "(model)"


@dataclass(frozen=True)
class LoweredSite:
    """What lowering did at one place; times are summed over the shapes it was timed at."""

    site: str
    rule: str
    replaced: bool
    microseconds_before: float | None = None
    microseconds_after: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class OutputError:
    """What one pass cost at one output; decibels are None where nothing changed at all."""

    pass_name: str
    output: str
    sqnr_db: float | None
    relative_error: float | None = None
    kl: float | None = None
    top1: float | None = None


@dataclass
class Report:
    """What `optimize` did, from capture to lowering.

    `bytes_after` is what the weights take as they are stored, `bytes_held` what the running model
    holds: more where a kernel keeps a copy of its own, or a weight runs in floating point.
    """

    model: str
    model_class: str
    dtype: str
    recipe: dict[str, Any]
    history: list[PassRecord] = field(default_factory=list[PassRecord])
    bytes_before: int = 0
    bytes_after: int = 0
    bytes_held: int = 0
    seconds: float = 0.0
    target: str = ""
    notes: list[str] = field(default_factory=list[str])
    lowering: list[LoweredSite] = field(default_factory=list[LoweredSite])
    modules: list[str] = field(default_factory=list[str])
    versions: dict[str, str] = field(default_factory=dict[str, str])
    machine: dict[str, Any] = field(default_factory=dict[str, Any])

    # --- plain data -------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `report.json` holds."""
        data: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        data["history"] = [record.to_dict() for record in self.history]
        data["lowering"] = [asdict(site) for site in self.lowering]
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Report":
        """The inverse of `to_dict`.

        Raises:
            LoadError: the data is not a report.
        """
        try:
            history = [PassRecord.from_dict(record) for record in data["history"]]
            lowering = [LoweredSite(**site) for site in data["lowering"]]
            plain: dict[str, Any] = {**data, "history": history, "lowering": lowering}
            report = Report(**plain)
            TypeAdapter(Report).validate_python(asdict(report))
            str(report)  # what was measured has no fixed form; it can be shown, or it is no report
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(
                f"report.json is not a report of this fxopt ({error}). Save the model again."
            ) from error
        return report

    # --- what is in it ----------------------------------------------------------------------

    def errors(self) -> list[OutputError]:
        """What each lossy pass cost at each output."""
        rows: list[OutputError] = []
        for record in self.history:
            measured = record.verification
            for name, decibels in measured.get("outputs", {}).items():
                # The other figures are stated once, for the output that lost most.
                worst = name == measured.get("worst_output") or len(measured["outputs"]) == 1
                rows.append(
                    OutputError(
                        record.name,
                        name,
                        decibels,
                        measured.get("relative_error") if worst else None,
                        measured.get("kl") if worst else None,
                        measured.get("top1") if worst else None,
                    )
                )
        return rows

    def layer_decibels(self) -> dict[str, dict[str, float]]:
        """Per pass: the decibels that it left at each layer, where they were measured."""
        return {
            record.name: {path: float(db) for path, db in layers.items() if db is not None}
            for record in self.history
            if isinstance(layers := record.verification.get("layers"), dict) and layers
        }

    def refusals(self) -> dict[tuple[str, str], int]:
        """How often each pass refused a site for which reason."""
        counts: dict[tuple[str, str], int] = {}
        for record in self.history:
            for refusal in record.refusals:
                key = (record.name, refusal.reason)
                counts[key] = counts.get(key, 0) + 1
        for site in self.lowering:
            if not site.replaced:
                # The timings differ at every site and are in the table of lowered sites.
                key = ("lower", site.reason.partition(":")[0])
                counts[key] = counts.get(key, 0) + 1
        return counts

    # --- one module -------------------------------------------------------------------------

    def explain(self, path: str) -> str:
        """What happened to one module, pass by pass; modules inside it included.

        Raises:
            InputError: the model has no such module; the message names the nearest.
        """
        known = self.known_paths()
        if path not in ("", WHOLE_MODEL) and not any(_inside(other, path) for other in known):
            near = difflib.get_close_matches(path, known, n=3, cutoff=0.3)
            advice = f" Did you mean {' or '.join(map(repr, near))}?" if near else _some(known)
            raise InputError(f"the model has no module {path!r}.{advice}")
        lines = [path or WHOLE_MODEL]
        for record in self.history:
            lines += _section(f"{record.name} ({record.exactness})", self._pass_lines(record, path))
        rows = [_lowered_line(site, path) for site in self.lowering if _inside(site.site, path)]
        if self.target or rows:
            lines += _section(f"lower to {self.target or 'kernels'}", rows)
        return "\n".join(lines)

    def known_paths(self) -> list[str]:
        """Every module path that the report knows, in the model's order."""
        paths = list(self.modules)
        for record in self.history:
            paths += [site.path for site in record.sites]
            paths += [_path_of(refusal.site) for refusal in record.refusals]
        paths += [site.site for site in self.lowering]
        return list(dict.fromkeys(paths))

    def _pass_lines(self, record: PassRecord, path: str) -> Iterator[str]:
        for site in record.sites:
            if _inside(site.path, path):
                yield f"{_name(site.path, path)}{site.detail}"
        for refusal in record.refusals:
            if _inside(_path_of(refusal.site), path):
                place = _name(_path_of(refusal.site), path)
                yield f"{place}left as it is: {refusal.reason}"
        for layer, decibels in self.layer_decibels().get(record.name, {}).items():
            if _inside(layer, path):
                yield f"{_name(layer, path)}{decibels:.1f} dB after this pass"

    # --- for people -------------------------------------------------------------------------

    def to_markdown(self) -> str:
        """The report as a Markdown document."""
        from fxopt.pipeline.report_text import to_markdown

        return to_markdown(self)

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML file that needs nothing else.

        Raises:
            SaveError: the file cannot be written.
        """
        from fxopt.pipeline.report_html import to_html

        try:
            Path(path).write_text(to_html(self), "utf-8")
        except OSError as error:
            raise SaveError(f"the report cannot be written to {str(path)!r}: {error}") from error

    def __rich__(self) -> Any:
        from fxopt.pipeline.report_text import to_rich

        return to_rich(self)

    def __str__(self) -> str:
        return self.to_markdown()


def build_report(
    model: nn.Module,
    recipe: Recipe,
    program: Program,
    lowered: Lowered,
    bytes_before: int,
    seconds: float,
) -> Report:
    """Gather what `optimize` knows at its end."""
    config: Any = getattr(model, "config", None)
    paths = [module_path(node) for node in program.graph.nodes]
    return Report(
        # Of a folder the last part: a report travels, and a machine's paths should not.
        model=Path(str(getattr(config, "_name_or_path", "") or type(model).__name__)).name,
        model_class=type(model).__name__,
        dtype=_dtype_of(model),
        recipe=recipe.to_dict(),
        history=list(program.history),
        bytes_before=bytes_before,
        bytes_after=program.byte_count(),
        bytes_held=bytes_held([program, lowered.program]),
        seconds=seconds,
        target=lowered.target,
        notes=[*program.notes, *_native_notes(lowered.target)],
        lowering=_lowered_sites(lowered),
        modules=[path for path in dict.fromkeys(paths) if path],
        versions={**versions(), "python": platform.python_version()},
        machine=machine(),
    )


def machine() -> dict[str, Any]:
    """The processor that figures of this report were taken on."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() == "flags":
                flags.update(value.split())
    except OSError:  # not Linux: the name alone
        pass
    return {
        "cpu": name,
        "flags": [flag for flag in wanted if flag in flags],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _native_notes(target: str) -> list[str]:
    if target != "cpu":
        return []
    status = native_status()
    return [] if status.loaded else [f"native CPU kernels are off: {status.reason}"]


def _dtype_of(model: nn.Module) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return ", ".join(sorted(dtypes))


def _lowered_sites(lowered: Lowered) -> list[LoweredSite]:
    timed = {(path, rule): key for path, rule, key in lowered.timed_sites}
    rows: list[LoweredSite] = []
    for site in lowered.sites:
        timing = lowered.timings.get(timed.get((site.path, site.detail), ""))
        before, after = (sum(timing.before), sum(timing.after)) if timing else (None, None)
        rows.append(LoweredSite(site.path, site.detail, True, before, after))
    for refusal in lowered.refusals:
        rows.append(LoweredSite(_path_of(refusal.site), "", False, reason=refusal.reason))
    return rows


# --- paths ----------------------------------------------------------------------------------


def _path_of(site: str) -> str:
    """The module path of a refusal's site, which may end in the node's name in brackets."""
    return site.partition(" [")[0]


def _some(paths: Iterable[str]) -> str:
    """The first modules there are, for who guessed none of them."""
    shown = sorted(path for path in paths if path)[:5]
    return f" There are {', '.join(map(repr, shown))} and so on." if shown else ""


def _inside(path: str, module: str) -> bool:
    return module in ("", WHOLE_MODEL) or path == module or path.startswith(f"{module}.")


def _name(path: str, module: str) -> str:
    return "" if path == module else f"{path or WHOLE_MODEL}: "


def _section(title: str, found: Any) -> list[str]:
    rows = [f"    {row}" for row in found]
    return [f"  {title}", *(rows or ["    nothing changed here"])]


def _lowered_line(site: LoweredSite, path: str) -> str:
    place = _name(site.site, path)
    if not site.replaced:
        return f"{place}kept as it is: {site.reason}"
    times = ""
    if site.microseconds_before is not None and site.microseconds_after is not None:
        times = f", {site.microseconds_before:.0f} -> {site.microseconds_after:.0f} us"
    return f"{place}{site.rule}{times}"


def dump_json(data: Any) -> str:
    """Strict JSON: numbers that JSON lacks become strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not abs(value) < float("inf"):
            return str(value)
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return json.dumps(plain(data), indent=1, allow_nan=False)
