"""`modhifi score`: the fidelity of every component and of HiFi sets, as a table, a file or pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from modhifi.disk import check_file
from modhifi.pruning.selectors import SELECTORS
from modhifi.registry import one_of
from modhifi.runs.devices import resolve_device
from modhifi.runs.inputs import load_source
from modhifi.runs.recipes.files import Option, Strict
from modhifi.runs.recipes.prune import CalibrationData, Device, ModelSource, Seed
from modhifi.runs.score import ETAS, FEW, GroupScores, score_model, write_scores

from .common import (
    JsonOption,
    QuietOption,
    imported_for_good,
    print_json,
    print_warnings,
    progress,
    stdout_console,
    wide_table,
)
from .options import takes

# The shares of the components of which the table shows the Subset Fidelity.
KEPT = (0.1, 0.25, 0.5)
LEGEND = {
    "max, mean": "fidelity of a component alone, at the output channel where it is largest: the largest and the mean "
    "over the layer's components",
    "η = 0.8": "share of the layer's components in its HiFi set: those that go last, as few as reach Subset Fidelity "
    "0.8",
    "k = 25 %": "Subset Fidelity of the quarter of the components that goes last",
    "free": "components whose joint removal costs at most a millionth of the output energy",
}


class ScoreRun(Strict):
    """The parts of a recipe that the scores need."""

    model: ModelSource
    data: CalibrationData = CalibrationData()
    selector: Annotated[one_of(SELECTORS), Option(panel="Method")] = "obs"  # type: ignore[valid-type]
    """How the order of removal is found: the components that go last are the HiFi sets."""
    layer: Annotated[list[str], Option(panel="Method", metavar="GROUP")] = []
    """Look into the groups of this name pattern, output channel by output channel; repeat it."""
    seed: Seed = 0
    device: Device = "auto"


@takes(ScoreRun, files=False)
def score(
    run: ScoreRun,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write FILE.json, FILE.csv or FILE.safetensors.", rich_help_panel="Output"),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw FILE.html or FILE.png: histograms, Subset Fidelity against k, HiFi shares, similarities.",
            rich_help_panel="Output",
        ),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure every component and HiFi set: singleton and Subset Fidelity, energy, removal cost and order.

    "max" and "mean" are over the components of a layer; the fidelity of one component is the largest over the output
    channels of its readers.

    "η = 0.8" is the share of a layer's components in its HiFi set: as few as reach Subset Fidelity 0.8, of those that
    go last under --selector.

    "k = 25 %" is the Subset Fidelity of the quarter that goes last, after least squares.

    "free" counts components whose joint removal costs at most a millionth of the output energy.

    --layer adds the energy, fidelities and HiFi set size of each output channel to screen, .json and .safetensors, and
    picks the layer whose similarity matrix is drawn.
    """
    check_file(out, "--out", json="all", csv="a table", safetensors="tensors")
    check_file(plot, "--plot", html="a page of charts", png="an image")
    with progress(quiet or as_json) as report:
        with imported_for_good():
            loaded = load_source(run.model)
        print_warnings(loaded.warnings)
        loaded.model.to(resolve_device(run.device))
        data = run.data
        scores = score_model(
            loaded, data.source, data.samples, run.seed, report, data.window, run.selector, run.layer, plot is not None
        )
    for name, reason in scores.left.items():
        typer.echo(f"modhifi: warning: the group '{name}' has no scores: {reason}", err=True)
    if out is not None:
        write_scores(scores, out)
    if plot is not None:
        _draw(plot, f"Fidelity of the components of {run.model.name}", scores)
    if as_json:
        print_json([s.to_json() for s in scores])
        return
    console = stdout_console()
    _show(console, scores)
    for entry in (s for s in scores if s.channels):
        _show_channels(console, entry)


def _show(console: Console, scores: list[GroupScores]) -> None:
    """Prints a row a layer, what the columns are, and in how many layers few components do."""
    shares = (*(f"η =\n{e:g}" for e in ETAS), *(f"k =\n{k:.0%}" for k in KEPT))
    table = wide_table("group", "n", "max", "mean", *shares, "free", words=("group",))
    for s in scores:
        curve = s.subset_fidelity()
        table.add_row(
            s.group,
            str(len(s.singleton)),
            f"{float(s.singleton.max()):.3f}",
            f"{float(s.singleton.mean()):.3f}",
            *(f"{s.hifi_share(eta):.1%}" for eta in ETAS),
            *(_fidelity(float(curve[max(1, round(share * len(s.singleton)))])) for share in KEPT),
            str(s.free()),
        )
    console.print(table)
    legend = Table.grid(padding=(0, 2))
    for name, meaning in LEGEND.items():
        legend.add_row(name, meaning)
    console.print(legend)
    few = sum(s.hifi_share(ETAS[1]) <= FEW for s in scores)
    console.print(
        f"{100 * FEW:g} % of the components or fewer reach Subset Fidelity {ETAS[1]:g} in {few} of the "
        f"{len(scores)} layers above",
        highlight=False,
    )


def _fidelity(value: float) -> str:
    return "" if value != value else f"{value:.3f}"


def _show_channels(console: Console, scores: GroupScores) -> None:
    """Prints a row for each output channel of a layer's readers."""
    title = f"output channels that read {scores.group}"
    table = wide_table(
        "reader",
        "channel",
        "energy",
        "best\nsingleton",
        "of\ncomponent",
        *(f"NAIVE k,\nη = {e:g}" for e in ETAS),
        words=("reader",),
        title=title,
    )
    for part in scores.channels:
        best, which = part.singleton.max(1)
        for channel in range(len(part.energy)):
            table.add_row(
                part.reader,
                str(channel),
                f"{float(part.energy[channel]):.3g}",
                f"{float(best[channel]):.3f}",
                str(int(part.components[which[channel]])),
                *(str(int(part.hifi[eta][channel])) for eta in ETAS),
            )
    console.print(table)


def _draw(path: Path, title: str, scores: list[GroupScores]) -> None:
    # It imports matplotlib.
    from modhifi.artifacts.fidelity_charts import write_pictures

    shown = next(s for s in scores if s.similarity is not None)
    assert shown.similarity is not None
    write_pictures(path, title, [s.to_json() for s in scores], shown.group, shown.similarity.numpy())
