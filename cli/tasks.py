"""`modhifi tasks`: lm-eval's tasks before and after an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modhifi.models.load import load_model
from modhifi.runs.devices import resolve_device
from modhifi.runs.inputs import load_source
from modhifi.runs.lm_eval_tasks import compare_tasks
from modhifi.runs.recipes.files import Option, Strict
from modhifi.runs.recipes.prune import ModelSource

from .common import DeviceOption, JsonOption, SeedOption, print_json, print_warnings, stdout_console
from .options import takes


class Original(Strict):
    """The original of an edit."""

    against: Annotated[ModelSource, Option("--against", metavar="MODEL")]
    """The original it was made from."""


@takes(Original, files=False)
def tasks(
    original: Original,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An artefact of prune: a language model.")],
    task: Annotated[
        list[str], typer.Option("--task", help="A task of lm-eval's; may be repeated.", rich_help_panel="Checks")
    ],
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Documents of each task; by default all.", rich_help_panel="Checks"),
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(
            "--include",
            exists=True,
            file_okay=False,
            help="A folder of task files of your own.",
            rich_help_panel="Checks",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Requests at once.", rich_help_panel="Advanced")
    ] = 4,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run tasks of lm-eval (pip install 'modhifi\\[lm-eval]') on a language model before and after its edit."""
    before, after = load_source(original.against), load_model(directory)
    for loaded in (before, after):
        print_warnings(loaded.warnings)
        loaded.model.to(resolve_device(device))
    rows = compare_tasks(before, after, task, limit=limit, include=include, batch_size=batch_size, seed=seed)
    if as_json:
        print_json({"rows": [row.to_json() for row in rows]})
        return
    table = Table("task", "metric", "documents", "before", "after", title=f"lm-eval on {directory}")
    for row in rows:
        table.add_row(
            row.task,
            row.metric,
            str(row.n),
            _figure(row.before, row.stderr_before),
            _figure(row.after, row.stderr_after),
        )
    stdout_console().print(table)


def _figure(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
