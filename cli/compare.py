"""`modhifi compare`: a grid of selectors, compensations and budgets on shared moments, and its Pareto front."""

from __future__ import annotations

import shlex
import sys
import textwrap
from typing import Any

from modhifi.artifacts.formatting import number
from modhifi.cache import default_directory
from modhifi.runs.devices import resolve_device
from modhifi.runs.recipes.compare import NOT_SHARED, CompareRecipe

from .common import (
    CacheOption,
    ForceOption,
    JsonOption,
    NoCacheOption,
    QuietOption,
    print_json,
    progress,
    stdout_console,
    wide_table,
)
from .options import takes
from .screens import show_outcome

FRONTS = {"flops": "FLOPs", "time": "time"}
REASON = "differs from cell to cell, or is no part of a grid"


@takes(CompareRecipe, without={f"method.{key}": REASON for key in NOT_SHARED}, files=False)
def compare(
    recipe: CompareRecipe,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Prune with many selectors, compensations and budgets on shared moments, and draw the Pareto front.

    The model is measured once.

    Quality is top-1 accuracy where the held-out data has labels, else agreement, and of values the variance kept.

    Time is that of one sample over the original's, measured in turns.

    "front" names the costs in which no other cell is as cheap, within 2 %, and better by more than chance.

    A budget out of reach makes an empty cell, not an error.

    With --out a directory gets report.json, report.html and front.png.
    """
    # They import the libraries of models, and matplotlib.
    from modhifi.calibration.cache import MomentCache
    from modhifi.runs.compare import run_compare

    moments = None if no_cache else MomentCache(cache or default_directory())
    with progress(quiet or as_json) as report:
        done = run_compare(
            recipe,
            device=resolve_device(recipe.device),
            force=force,
            cache=moments,
            progress=report,
            command=shlex.join(["modhifi", *sys.argv[1:]]),
        )
    if as_json:
        print_json({**done.report, "path": None if done.path is None else str(done.path)})
        return
    if not quiet:
        _show(done.report)
    show_outcome(stdout_console(), {**done.report, "verdicts": []})
    if done.path is not None:
        stdout_console().print(done.path / "report.html", soft_wrap=True, markup=False, highlight=False)


def _show(report: dict[str, Any]) -> None:
    """Prints a row a cell, and why some are empty."""
    console, comparison = stdout_console(), report["comparison"]
    text = comparison["perplexity_before"] is not None
    words, quality = ("selector", "compensate", "budget", "front"), "\n".join(textwrap.wrap(comparison["quality"], 9))
    figures = ("FLOPs", "params", "time", quality, *(["perplexity"] if text else []))
    table = wide_table(*words[:-1], *figures, words[-1], words=words, title=report["title"])
    for cell in comparison["cells"]:
        names = (cell["selector"], cell["compensate"], cell["budget"])
        if cell["error"] is not None:
            table.add_row(*names)
            continue
        table.add_row(
            *names,
            *(f"{cell[key]:.3f}x" for key in ("flops", "parameters", "time")),
            number(cell["quality"], "%"),
            *([number(cell["perplexity_after"])] if text else []),
            ", ".join(FRONTS[cost] for cost in cell["front"]),
        )
    console.print(table)
    if report["data"].get("moments"):
        console.print(report["data"]["moments"], highlight=False)
    for warning in report["warnings"]:
        console.print(f"note: {warning}", style="yellow", markup=False, highlight=False)
