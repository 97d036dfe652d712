"""What the verbs share: option types, the device, progress on stderr, JSON on stdout."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modhifi.errors import ModhifiError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

# The bracket is escaped: typer reads help texts as rich markup.
MODEL_HELP = "timm:NAME, hf:ORG/NAME\\[@REVISION], demo:resnet, or a directory."

DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    typer.Option("--device", help="Where to run; auto takes a GPU if there is one."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="The seed of everything random.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and only JSON, on stdout.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an output directory that is not empty.")]
MaxFlipOption = Annotated[
    float | None, typer.Option("--max-flip", help="Largest share of inputs whose top-1 may change, such as 0.05.")
]
MaxErrorOption = Annotated[
    float | None,
    typer.Option("--max-error", help="Largest change of the output (Euclidean) that 95 % of inputs must keep to."),
]
MaxPerplexityOption = Annotated[
    float | None,
    typer.Option("--max-perplexity-ratio", help="Largest perplexity over the original's, of causal language models."),
]
ConfidenceOption = Annotated[float, typer.Option("--confidence", help="Confidence of the statistical bounds.")]
NotASampleOption = Annotated[
    bool, typer.Option("--not-a-sample", help="The data was not drawn at random: claim nothing beyond it.")
]
WalkedOption = Annotated[
    int | None,
    typer.Option(
        "--walked", min=0, help="Samples for the certified rungs; by default 16 images, 1 text, none of large models."
    ),
]

Report = Callable[[str, int, int], None]


def entries(package: str) -> list[str]:
    """The names in the registry of a package, by its files: to import them takes seconds that a help text has not."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return [file.name.replace("_", "-") for file in pkgutil.iter_modules(folders) if file.name != "base"]


def resolve_device(name: str) -> torch.device:
    """The device called ``name``, where ``auto`` is cuda if it is there and cpu if not; mps has no float64.

    Raises ModhifiError if the device is not available.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available.get(name, False):
        raise ModhifiError(f"the device {name!r} is not available here; use --device auto or --device cpu")
    return torch.device(name)


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yield ``report(stage, done, total)``, which draws one bar a stage on stderr.

    Draws nothing with ``quiet`` or where stderr is not a terminal. rich honours NO_COLOR.
    """
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

    # isatty and not rich's own test, which FORCE_COLOR overrides: bars have no place in a log.
    hidden = quiet or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def stdout_console() -> Console:
    """A rich console for tables: as wide as the terminal, and wide enough for whole names where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def print_json(payload: Any) -> None:
    """Print ``payload`` on stdout as JSON; numbers that are not finite, which JSON does not know, become null."""
    print(json.dumps(_finite(payload), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
