"""`modhifi tasks`: lm-eval's tasks before and after an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DeviceOption, JsonOption, SeedOption, print_json, resolve_device, stdout_console
from .prune import GgufOption, RevisionOption, TrustOption, model_source


def tasks(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An artefact of prune: a language model.")],
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The original it was made from.")],
    task: Annotated[list[str], typer.Option("--task", help="A task of lm-eval's; may be repeated.")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task; by default all.")] = None,
    include: Annotated[
        Path | None, typer.Option("--include", exists=True, file_okay=False, help="A folder of task files of your own.")
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    gguf_file: GgufOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests at once.")] = 4,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run tasks of lm-eval (pip install 'modhifi\\[lm-eval]') on a language model before and after its edit."""
    from modhifi.models.load import load_model
    from modhifi.runs.inputs import load_source
    from modhifi.runs.lm_eval_tasks import compare_tasks
    from modhifi.runs.recipe import ModelSource

    source = model_source(against, None, None, revision, False, trust_remote_code, gguf_file)
    original, edited = load_source(ModelSource(**source)), load_model(directory)
    for loaded in (original, edited):
        loaded.model.to(resolve_device(device))
    rows = compare_tasks(original, edited, task, limit=limit, include=include, batch_size=batch_size, seed=seed)
    if as_json:
        print_json({"rows": [row.to_json() for row in rows]})
        return
    from rich.table import Table

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
