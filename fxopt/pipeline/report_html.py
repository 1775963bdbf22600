"""A report as one HTML file, its plots drawn as SVG inside it."""

import math
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from fxopt.ir.program import Table
from fxopt.pipeline.report import Report
from fxopt.pipeline.report_text import (
    error_rows,
    fact_rows,
    lowering_rows,
    pass_row,
    refusal_rows,
    table_rows,
    tables,
)

_BAR = 18
_WIDTH, _HEIGHT = 420, 240
_MARGIN = 70


@cache
def _template() -> Template:
    loader = PackageLoader("fxopt.pipeline")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(
        "report.html.jinja"
    )


def to_html(report: Report) -> str:
    """The report as a document that needs no other file."""
    plots = [("Bytes of all weights", _bars(_bytes(report), "{:,.0f}"))]
    plots += [
        (f"Decibels after {name}, by layer (higher is better)", _bars(layers, "{:.1f}"))
        for name, layers in report.layer_decibels().items()
    ]
    return _template().render(
        report=report,
        facts=fact_rows(report),
        passes=[pass_row(record) for record in report.history],
        refusals=refusal_rows(report),
        errors=error_rows(report),
        lowering=lowering_rows(report),
        plots=plots,
        tables=[
            (title, list(found.columns), table_rows(found), _points(found))
            for title, found in tables(report)
        ],
    )


def _bytes(report: Report) -> dict[str, float]:
    rows = {"original": float(report.bytes_before)}
    rows |= {f"after {record.name}": float(record.bytes_after) for record in report.history}
    return rows


def _bars(values: dict[str, float], form: str) -> dict[str, Any]:
    """Horizontal bars: what the template needs to draw them."""
    largest = max([*values.values(), 0.0]) or 1.0
    left = 8 + 7 * max((len(label) for label in values), default=0)
    bars = [
        {
            "label": label,
            "text": form.format(value),
            "y": _BAR * index,
            "length": round(_WIDTH * max(value, 0.0) / largest, 1),
        }
        for index, (label, value) in enumerate(values.items())
    ]
    return {"bars": bars, "left": left, "width": left + _WIDTH + 110, "height": _BAR * len(bars)}


def _points(table: Table) -> dict[str, Any] | None:
    """Column y over column x as points, y on a logarithmic axis; None for a table without."""
    if not table.x or not table.rows:
        return None
    x, y = (
        [float(row[table.columns.index(name)]) for row in table.rows] for name in (table.x, table.y)
    )
    smallest = min((value for value in y if value > 0), default=1.0)
    logs = [math.log10(max(value, smallest)) for value in y]
    points = [
        {
            "x": round(_MARGIN + _WIDTH * _share(a, x), 1),
            "y": round(8 + _HEIGHT * (1 - _share(b, logs)), 1),
            "mark": row[-1] == "chosen",
            "text": f"{table.x} {a:,.6g}, {table.y} {c:.3g}",
        }
        for a, b, c, row in zip(x, logs, y, table.rows, strict=True)
    ]
    return {
        "points": sorted(points, key=lambda point: point["x"]),
        "left": f"{min(x):,.5g}",
        "right": f"{max(x):,.5g}",
        "low": f"{min(y):.3g}",
        "high": f"{max(y):.3g}",
        "x_name": table.x,
        "y_name": table.y,
        "margin": _MARGIN,
        "width": _MARGIN + _WIDTH + 20,
        "height": _HEIGHT + 16,
    }


def _share(value: float, values: list[float]) -> float:
    """Where a value lies between the smallest and the largest, 0 to 1."""
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else 0.5
