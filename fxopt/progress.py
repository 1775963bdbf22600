"""A progress bar for long work, on stderr; silent where nobody looks."""

import contextlib
import sys
from collections.abc import Generator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fxopt.pipeline.manager import Progress as Told
from fxopt.pipeline.manager import silent


@contextlib.contextmanager
def bar(wanted: bool | Told, passes: int) -> Generator[Told]:
    """A callable to tell stages to; draws a bar when asked for and stderr is a terminal."""
    if callable(wanted):
        yield wanted
        return
    if not wanted or not sys.stderr.isatty():
        yield silent
        return
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("fxopt", total=passes + 2, detail="")
        current = ""

        def tell(stage: str, detail: str = "") -> None:
            nonlocal current
            advance = 1 if stage != current and current else 0
            current = stage
            shown.update(task, description=stage, detail=detail[-40:], advance=advance)

        yield tell
