"""`modhifi score`: the fidelity of every component, as a table or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from modhifi.disk import check_file
from modhifi.runs.devices import resolve_device
from modhifi.runs.inputs import load_source
from modhifi.runs.recipe import CalibrationData, Device, ModelSource, Seed
from modhifi.runs.recipe_file import Strict
from modhifi.runs.score import score_model, write_scores

from .common import JsonOption, QuietOption, imported_for_good, print_json, print_warnings, progress, stdout_console
from .options import takes


class ScoreRun(Strict):
    """The parts of a recipe that the scores need."""

    model: ModelSource
    data: CalibrationData = CalibrationData()
    seed: Seed = 0
    device: Device = "auto"


@takes(ScoreRun, files=False)
def score(
    run: ScoreRun,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write FILE.json, FILE.csv or FILE.safetensors.", rich_help_panel="Output"),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure every component: singleton fidelity, energy score, exact removal cost, order of removal."""
    check_file(out, "--out", json="all", csv="a table", safetensors="tensors")
    with progress(quiet or as_json) as report:
        with imported_for_good():
            loaded = load_source(run.model)
        print_warnings(loaded.warnings)
        loaded.model.to(resolve_device(run.device))
        scores = score_model(loaded, run.data.source, run.data.samples, run.seed, report, run.data.window)
    for name, reason in scores.left.items():
        typer.echo(f"modhifi: warning: the group '{name}' has no scores: {reason}", err=True)
    if out is not None:
        write_scores(scores, out)
    if as_json:
        print_json([s.to_json() for s in scores])
        return
    table = Table("group", "components", "best singleton", "mean singleton", "free to remove", "half costs")
    for s in scores:
        table.add_row(
            s.group,
            str(len(s.singleton)),
            f"{float(s.singleton.max()):.3f}",
            f"{float(s.singleton.mean()):.3f}",
            str(s.free()),
            f"{s.half_cost():.2%} of the energy",
        )
    stdout_console().print(table)
