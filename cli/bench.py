"""`modhifi bench`: models side by side, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modhifi.disk import check_file
from modhifi.runs.recipes.bench import BenchRun

from .common import JsonOption, QuietOption, print_json, progress, stdout_console, wide_table
from .options import takes

# A terminal of up to as many columns gets a time and its spread in two lines.
NARROW = 100


@takes(BenchRun, files=False)
def bench(
    run: BenchRun,
    others: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="More of them; an artefact's original is timed beside it."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the times into FILE.png or FILE.svg.", rich_help_panel="Output")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time models side by side in one process: latency by runtime, batch and threads, and memory."""
    # Whoever asks for help does not wait for the libraries of models.
    from modhifi.runs.devices import resolve_device
    from modhifi.runs.timing.bench import bench_models
    from modhifi.runs.timing.subjects import subjects_of

    check_file(plot, "--plot", png="a picture", svg="a drawing")
    with progress(quiet or as_json) as report:
        subjects, notes = subjects_of([run.model.name, *(others or [])], resolve_device(run.device), run.model)
        result = bench_models(subjects, run.settings, notes, report)
    if plot is not None:
        from modhifi.runs.timing.plot import draw

        draw(result.rows, plot)
    if as_json:
        print_json(result.to_json())
    else:
        _show(result)


def _show(result: Any) -> None:
    from modhifi.artifacts.formatting import change, number

    console = stdout_console()
    for note in result.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    columns = ("runtime", "batch", "threads", "model", "one batch", "items\na second", "against its original", "memory")
    table = wide_table(*columns, words=("runtime", "model", "against its original"), title=result.device)
    gap = " " if console.width > NARROW else "\n"
    for row in result.rows:
        setting = (row.runtime, str(row.batch), str(row.threads), row.model)
        if row.median is None:
            table.add_row(*setting, "", "", row.reason, "")
            continue
        alone = row.model == row.reference
        ratio = "" if alone or row.ratio is None else f"{row.ratio:.3f} x"
        said = "" if alone else change({"ratio": row.ratio, "spread": row.ratio_iqr})
        table.add_row(
            *setting,
            f"{number(row.median, 's')}{gap}± {number(row.iqr, 's')}",
            number(row.per_second),
            f"{ratio} {said}".strip(),
            number(row.memory, "B"),
        )
    console.print(table)
    console.print("medians and interquartile ranges, all models of a setting in turns")
