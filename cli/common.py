"""The common parts of the verbs: option types, progress on stderr, JSON on stdout."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modhifi.artifacts.escape import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# The parts of a verb's help, in their order.
PANELS = ("Most used", "Budget", "Data", "Method", "Checks", "Output", "Loading", "Advanced")

DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    typer.Option("--device", help="Where to run; auto takes a GPU if there is one.", rich_help_panel="Advanced"),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="The seed of everything random.", rich_help_panel="Advanced")
]
QuietOption = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print the outcome and where it is, nothing else.", rich_help_panel="Output"),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON, and only JSON, on stdout.", rich_help_panel="Output")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace an output directory that is not empty.", rich_help_panel="Output")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Keep moments here; by default $MODHIFI_CACHE or the user's cache directory.",
        rich_help_panel="Advanced",
    ),
]
NoCacheOption = Annotated[
    bool,
    typer.Option("--no-cache", help="Neither use nor keep moments of other runs.", rich_help_panel="Advanced"),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="Upload what passes; a new repository is private.",
        rich_help_panel="Output",
    ),
]

# Seconds after which a log shows that a long stage is alive.
PATIENCE = 30.0
Report = Callable[[str, int, int], None]


class Lines:
    """Progress for a log: a line where a stage begins, and signs of life between, with rate and time left."""

    def __init__(self) -> None:
        self.starts: dict[str, tuple[float, int]] = {}
        self.last = -math.inf

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Writes where a stage begins, and inside it every ``PATIENCE`` seconds."""
        begins = stage not in self.starts and not stage.startswith(" ")
        now = time.monotonic()
        start, first = self.starts.setdefault(stage, (now, done))
        if begins or now - self.last >= PATIENCE:
            count = "" if begins else f": {done} of {total}{_pace(done - first, total - done, now - start)}"
            print(f"modhifi: {stage.strip()}{count}", file=sys.stderr, flush=True)
            self.last = time.monotonic()


def _pace(done: int, left: int, seconds: float) -> str:
    """The rate and the time left, in words; empty before anything is done."""
    if done <= 0 or seconds <= 0:
        return ""
    rate, minutes = done / seconds, left * seconds / done / 60
    speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    return f", {speed}, {minutes:.0f} min left" if minutes >= 1 else f", {speed}, {60 * minutes:.0f} s left"


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yields ``report(stage, done, total)``, which draws one bar a stage on stderr.

    Where stderr is no terminal it writes a line a stage, and one every ``PATIENCE`` seconds; with ``quiet`` nothing.
    rich honours NO_COLOR.
    """
    silent = quiet or os.environ.get("RANK", "0") != "0"
    # isatty and not rich's own test, which FORCE_COLOR overrides: bars have no place in a log.
    if silent or not sys.stderr.isatty():
        yield (lambda stage, done, total: None) if silent else Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Items a second, or seconds an item."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if not speed else f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


@contextmanager
def imported_for_good() -> Iterator[None]:
    """Keeps what is imported and loaded inside out of garbage collections, which would go through it again and again.

    Does nothing in a process that has imported a library of models before.
    """
    if {"timm", "transformers"} & sys.modules.keys():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def stdout_console() -> Console:
    """A rich console for tables: as wide as the terminal, and wide enough for whole names where there is none.

    Every text is shown as it is: names that others chose hold no markup, and what a terminal would obey is replaced.
    """
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **style: Any) -> Text:
            return super().render_str(printable(text), **style)

    return Plain(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)


def wide_table(*columns: str, words: Collection[str], title: str | None = None) -> Table:
    """A table of many figures, narrow enough for 80 columns.

    The columns of ``words`` go on in a line below where there is no room; figures stay whole.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in columns:
        if column in words:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", overflow="fold", no_wrap=True)
    return table


def print_warnings(warnings: Iterable[str]) -> None:
    """Prints what a user of the model has to know, one line each, on stderr."""
    for text in warnings:
        print(f"modhifi: warning: {one_line(text)}", file=sys.stderr)


def annotate(level: str, message: str) -> None:
    """Shows an error or a warning beside a run of GitHub Actions; does nothing elsewhere."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print(f"::{level} title=modhifi::{one_line(message).replace('%', '%25')}", file=sys.stderr)


def print_json(payload: Any) -> None:
    """Prints ``payload`` on stdout as JSON; numbers that are not finite, which JSON does not have, become null."""
    print(json.dumps(_finite(payload), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
