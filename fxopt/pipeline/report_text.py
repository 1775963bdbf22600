"""A report as Markdown and as a table for the terminal."""

from typing import Any

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from fxopt.ir.program import PassRecord, Table
from fxopt.pipeline.report import LoweredSite, Report


def to_markdown(report: Report) -> str:
    """The report as a Markdown document."""
    parts = [f"# fxopt report: {report.model}", _facts(report), "## Passes", _passes(report)]
    if refused := refusal_rows(report):
        parts += ["## Refusals", _table(["pass", "reason", "sites"], refused)]
    if errors := error_rows(report):
        header = ["pass", "output", "SQNR dB", "relative error", "KL", "top-1"]
        parts += ["## Error", _table(header, errors)]
    for name, layers in report.layer_decibels().items():
        rows = [[path, f"{decibels:.1f}"] for path, decibels in layers.items()]
        parts += [f"## Decibels after {name}", _table(["layer", "dB"], rows)]
    for title, table in tables(report):
        parts += [f"## {title}", _table(list(table.columns), table_rows(table))]
    if report.lowering:
        header = ["rule", "replaced", "kept", "us before", "us after"]
        parts += [f"## Lowering to {report.target}", _table(header, lowering_rows(report))]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def to_rich(report: Report) -> Any:
    """The report's heart as a table for the terminal."""
    recipe = report.recipe.get("name", "custom")
    table = RichTable(title=f"{report.model_class} ({report.model}) by {recipe}")
    for column in ("pass", "sites", "refused", "check", "bytes", "seconds"):
        table.add_column(column, justify="left" if column in ("pass", "check") else "right")
    for record in report.history:
        table.add_row(*pass_row(record))
    if report.lowering:
        replaced = sum(site.replaced for site in report.lowering)
        kept = len(report.lowering) - replaced
        table.add_row(f"lower to {report.target}", str(replaced), str(kept), "timed", "", "")
    lines: list[Any] = [table, Text(bytes_line(report))]
    lines += [
        Text(f"{name} left {count} as they were: {reason}", style="dim")
        for (name, reason), count in report.refusals().items()
    ]
    return Group(*lines)


# --- rows, shared with the HTML form --------------------------------------------------------


def fact_rows(report: Report) -> list[list[str]]:
    """The facts above the tables."""
    machine = report.machine
    flags = ", ".join(machine.get("flags", []))
    processor = str(machine.get("cpu", ""))
    return [
        ["class", report.model_class],
        ["dtype", report.dtype],
        ["recipe", str(report.recipe.get("name", "custom"))],
        ["bytes", bytes_line(report)],
        *([["calibration data", text]] if (text := calibration_text(report)) else []),
        ["seconds", f"{report.seconds:.1f}"],
        ["versions", ", ".join(f"{name} {text}" for name, text in report.versions.items())],
        ["processor", f"{processor} ({flags})" if flags else processor],
        ["threads", str(machine.get("threads", ""))],
        *([["gpu", str(machine["gpu"])]] if machine.get("gpu") else []),
    ]


def calibration_text(report: Report) -> str:
    """How often calibration data was read, and for whom; empty where no pass needed any."""
    readers = [record.name for record in report.history if record.calibration == "read"]
    heirs = [record.name for record in report.history if record.calibration == "carried over"]
    if not readers:
        return ""
    times = "once" if len(readers) == 1 else f"{len(readers)} times"
    carried = f"; carried over to {', '.join(heirs)}" if heirs else ""
    return f"read {times}, by {', '.join(readers)}{carried}"


def pass_row(record: PassRecord) -> list[str]:
    """One pass: name, sites, refusals, check, bytes, seconds."""
    return [
        record.name,
        str(len(record.sites)),
        str(len(record.refusals)),
        check_text(record),
        f"{record.bytes_after:,}",
        f"{record.seconds:.1f}",
    ]


def check_text(record: PassRecord) -> str:
    """What the verification of a pass found, in a few words."""
    measured = record.verification
    if "sqnr_db" in measured:
        decibels = measured["sqnr_db"]
        return "no change" if decibels is None else f"{decibels:.1f} dB"
    if "error_float64" in measured:
        return f"equal, error {measured['error_float64']:.1g} in float64"
    if "error_own_dtype" in measured:
        return f"equal, error {measured['error_own_dtype']:.1g}"
    return str(measured.get("mode", "not checked")).replace("off", "not checked")


def refusal_rows(report: Report) -> list[list[str]]:
    """Refusals grouped by pass and reason, the most frequent first."""
    counts = sorted(report.refusals().items(), key=lambda item: -item[1])
    return [[name, reason, str(count)] for (name, reason), count in counts]


def error_rows(report: Report) -> list[list[str]]:
    """One row for each pass and output."""
    return [
        [
            error.pass_name,
            error.output,
            _number(error.sqnr_db, ".1f", "no change"),
            _number(error.relative_error, ".3g"),
            _number(error.kl, ".3g"),
            _number(error.top1, ".3f"),
        ]
        for error in report.errors()
    ]


def tables(report: Report) -> list[tuple[str, Table]]:
    """What passes report as tables of their own, each with its title."""
    return [
        (f"{record.name}: {table.title}", table)
        for record in report.history
        for table in record.tables
    ]


def table_rows(table: Table) -> list[list[str]]:
    """The cells of a pass's table as text."""
    return [
        [cell if isinstance(cell, str) else f"{cell:,.6g}" for cell in row] for row in table.rows
    ]


def lowering_rows(report: Report) -> list[list[str]]:
    """Lowered sites by rule; those kept as they were by reason."""
    groups: dict[str, list[LoweredSite]] = {}
    for site in report.lowering:
        groups.setdefault(site.rule or site.reason.partition(":")[0], []).append(site)
    return [
        [
            name,
            str(sum(site.replaced for site in sites)),
            str(sum(not site.replaced for site in sites)),
            _sum([site.microseconds_before for site in sites]),
            _sum([site.microseconds_after for site in sites]),
        ]
        for name, sites in groups.items()
    ]


def bytes_line(report: Report) -> str:
    """Bytes of all weights before and after, with their ratio, and what running holds."""
    before, after, held = report.bytes_before, report.bytes_after, report.bytes_held
    ratio = f" ({after / before:.3f}x)" if before else ""
    running = f", {held:,} held while running ({held / before:.3f}x)" if held and before else ""
    return f"{before:,} -> {after:,} bytes{ratio}{running}"


def _number(value: float | None, form: str, missing: str = "") -> str:
    return missing if value is None else format(value, form)


def _sum(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known):.0f}" if known else ""


# --- Markdown -------------------------------------------------------------------------------


def _facts(report: Report) -> str:
    return _table(["", ""], fact_rows(report))


def _passes(report: Report) -> str:
    header = ["pass", "sites", "refused", "check", "bytes", "seconds"]
    return _table(header, [pass_row(record) for record in report.history])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
