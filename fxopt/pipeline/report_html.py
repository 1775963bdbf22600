"""A report as one HTML file, its plots drawn as SVG inside it."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from fxopt.pipeline.report import Report
from fxopt.pipeline.report_text import (
    error_rows,
    fact_rows,
    lowering_rows,
    pass_row,
    refusal_rows,
)

_BAR = 18
_WIDTH = 420


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
