"""The shell: `fxopt demo | optimize | inspect | diff | explain | bench | passes | recipes`."""

import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from fxopt import api
from fxopt.checkpoint import is_saved, load_model, load_program
from fxopt.demo import compare_speed, run_demo
from fxopt.errors import FxoptError, InputError, SaveError
from fxopt.ir.diff import diff as diff_programs
from fxopt.ir.text import format_program, operator_name
from fxopt.pipeline.options import known_passes
from fxopt.pipeline.recipe import Recipe
from fxopt.pipeline.report import Report, dump_json
from fxopt.pipeline.tokenizer import load_tokenizer
from fxopt.runtime.folder import check_destination, read_folder

_OUT = Console()
_ERR = Console(stderr=True)


class _CleanErrors(TyperGroup):
    """Prints what went wrong as one message; the traceback is shown with --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FxoptError as error:
            if ctx.params.get("debug"):
                raise
            name = type(error).__name__
            _ERR.print(f"[bold red]{name}[/]: {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_CleanErrors,
    help="Optimize transformer models; every rewrite is checked when it runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Target = Annotated[str, typer.Option(help="auto, reference, cpu or cuda.")]
Verify = Annotated[str | None, typer.Option(help="full, fast or off; the recipe's if left out.")]
Saved = Annotated[str, typer.Argument(help="A folder saved by fxopt.")]
Model = Annotated[str, typer.Argument(help="A model's folder, hub name or .gguf file.")]
Either = Annotated[str, typer.Argument(help="A folder saved by fxopt, or a model.")]


def _show_version(asked: bool) -> None:
    if asked:
        _OUT.print(f"fxopt {metadata.version('fxopt')}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Optimize transformer models; every rewrite is checked when it runs."""
    del debug, show_version  # read by _CleanErrors and by the callback


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Where to save the optimized model.")] = None,
    json: Json = False,
) -> None:
    """Quantize a real sentence encoder and measure it against the original."""
    with _spinner() as progress:
        task = progress.add_task("loading")
        result = run_demo(out, lambda stage: progress.update(task, description=stage))
    if json:
        _print_json(result.to_dict())
        return
    _OUT.print(result.report)
    table = _table("all-MiniLM-L6-v2 against eager fp32, same process, called in turns", "", "")
    table.add_row("relative error of last hidden state", f"{result.relative_error:.4f}")
    table.add_row("mean cosine of sentence embeddings", f"{result.cosine:.5f}")
    for speed in result.speeds:
        times = f"{speed.eager_ms:.1f} ms -> {speed.optimized_ms:.1f} ms"
        table.add_row(
            f"batch {speed.batch}, length {speed.length}", f"{times}, {speed.speedup:.2f}x"
        )
    equal = "bit-equal" if result.reload_bit_equal else "DIFFERENT"
    table.add_row("reloaded model", equal)
    _OUT.print(table)
    _OUT.print(f"saved to {result.folder}", soft_wrap=True)
    if not result.reload_bit_equal:
        raise typer.Exit(1)


@app.command()
def optimize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to save the optimized model.")],
    recipe: Annotated[str, typer.Option(help="A preset, or a .yaml or .json file.")],
    target: Target = "auto",
    verify: Verify = None,
    report: Annotated[Path | None, typer.Option(help="Write the report as HTML.")] = None,
    json: Json = False,
) -> None:
    """Optimize a model by a recipe and save the result."""
    resolved = Recipe.resolve(recipe)  # before minutes are spent on loading
    check_destination(out)
    _check_report(report, out)
    loaded = load_model(model)
    optimized = api.optimize(loaded, resolved, target=target, verify=verify)
    optimized.save_pretrained(out)
    tokenizer = load_tokenizer(model)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    if report is not None:
        optimized.report.to_html(report)
    if json:
        _print_json(optimized.report.to_dict())
        return
    _OUT.print(optimized.report)
    beside = "with its tokenizer" if tokenizer is not None else "(no tokenizer was found)"
    _OUT.print(f"saved to {out} {beside}", soft_wrap=True)


@app.command()
def inspect(
    place: Either,
    graph: Annotated[bool, typer.Option("--graph", help="Print the whole program.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Add a table of weights.")] = False,
    json: Json = False,
) -> None:
    """Show what a saved folder or a model holds: operators, weights, what was done."""
    stored = read_folder(place) if is_saved(place) else None
    program = stored.program if stored else load_program(place)
    counts = Counter(operator_name(node.target) for node in program.nodes())
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in program.weights().values())
    if json:
        _print_json(
            {
                "level": program.level.name,
                "signature": program.signature.to_dict(),
                "operators": dict(counts.most_common()),
                "weights": dict(dtypes),
                "bytes": program.byte_count(),
                "report": stored.report if stored else None,
                "program": format_program(program, weights=weights) if graph else None,
            }
        )
        return
    if graph:
        typer.echo(format_program(program, weights=weights))
        return
    if stored and stored.report:
        _OUT.print(Report.from_dict(stored.report))
    _OUT.print(_counts(f"operators at level {program.level.name}", counts))
    _OUT.print(_counts(f"weights, {program.byte_count():,} bytes", dtypes))


@app.command()
def diff(
    before: Either,
    after: Either,
    html: Annotated[Path | None, typer.Option(help="Write the difference as HTML.")] = None,
    json: Json = False,
) -> None:
    """Show what differs between two programs, module by module."""
    found = diff_programs(load_program(before), load_program(after))
    if html is not None:
        text = f"<!DOCTYPE html><meta charset='utf-8'>{found.to_html()}"
        try:
            html.write_text(text, "utf-8")
        except OSError as error:
            raise SaveError(f"the diff cannot be written to {str(html)!r}: {error}") from error
    if json:
        _print_json(found.to_dict())
    else:
        typer.echo(str(found))


@app.command()
def explain(
    place: Saved,
    path: Annotated[str, typer.Argument(help="A module's path, as in the original model.")],
    json: Json = False,
) -> None:
    """Tell what happened to one module, pass by pass."""
    stored = read_folder(place, shapes=False)
    if not stored.report:
        raise InputError(f"{place!r} carries no report; it was not written by fxopt.optimize.")
    text = Report.from_dict(stored.report).explain(path)
    if json:
        _print_json({"path": path, "lines": text.splitlines()})
    else:
        typer.echo(text)


@app.command()
def passes(json: Json = False) -> None:
    """List the passes."""
    found = {name: cls.summary() for name, cls in known_passes().items()}
    _print_catalogue("passes", found, json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema.")] = False,
    json: Json = False,
) -> None:
    """List the recipes that ship with fxopt, or print one."""
    if schema:
        _print_json(Recipe.json_schema())
    elif name is not None:
        recipe = Recipe.resolve(name)
        _print_json(recipe.to_dict()) if json else typer.echo(recipe.to_yaml())
    else:
        _print_catalogue("recipes", api.recipes(), json)


@app.command()
def bench(
    saved: Saved,
    model: Model,
    shape: Annotated[list[str], typer.Option(help="batch,length; may be repeated.")] = ["1,128"],  # noqa: B006 - typer reads the default and never changes it
    json: Json = False,
) -> None:
    """Time a saved model against its original, called in turns."""
    shapes = [_shape(text) for text in shape]
    optimized, original = api.load(saved), load_model(model)
    speeds = [compare_speed(original, optimized, *pair) for pair in shapes]
    if json:
        _print_json([vars(speed) | {"speedup": speed.speedup} for speed in speeds])
        return
    table = _table("medians, called in turns", "batch", "length", "eager ms", "fxopt ms", "speed")
    for speed in speeds:
        cells = (f"{speed.eager_ms:.2f}", f"{speed.optimized_ms:.2f}", f"{speed.speedup:.2f}x")
        table.add_row(str(speed.batch), str(speed.length), *cells)
    _OUT.print(table)


# --- arguments ------------------------------------------------------------------------------


def _check_report(report: Path | None, out: Path) -> None:
    if report is None or (report.parent.absolute() == out.absolute() and not report.is_dir()):
        return  # the folder of the model will be there by then
    if report.is_dir() or not report.parent.is_dir():
        raise SaveError(f"there is no place for a report at {str(report)!r}; give a file's path.")


def _shape(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise InputError(f"{text!r} is no shape; write batch,length, for instance 32,128.")
    return int(parts[0]), int(parts[1])


# --- printing -------------------------------------------------------------------------------


def _print_json(data: Any) -> None:
    typer.echo(dump_json(data))


def _print_catalogue(title: str, rows: dict[str, str], json: bool) -> None:
    if json:
        _print_json(rows)
        return
    table = _table(title, "name", "what it does")
    for name, summary in rows.items():
        table.add_row(name, summary)
    _OUT.print(table)


def _counts(title: str, counts: "Counter[str]") -> Table:
    table = _table(title, "", "count")
    for name, count in counts.most_common():
        table.add_row(name, str(count))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column)
    return table


def _spinner() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = sys.stderr.isatty()
    return Progress(*columns, console=_ERR, transient=True, disable=not shown)


if __name__ == "__main__":
    app()
