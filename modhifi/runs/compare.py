"""A grid of selectors, compensations and budgets on shared moments, and its Pareto front."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modhifi.artifacts.pareto import fronts, measured, write_png
from modhifi.artifacts.report import render_html
from modhifi.bounds.held_out import tabulate
from modhifi.calibration.cache import MomentCache
from modhifi.data.samples import Samples, warn_degenerate
from modhifi.disk import check_output, home_path, jsonable
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Clock, Progress, silent
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.grid import Measured, measure_once, order_once, prune_measured
from modhifi.pruning.settings import PruneSettings
from modhifi.runs.defaults import complete, rounding_for
from modhifi.runs.inputs import NOTHING, Given, load_data, load_source, local_paths, place, seen_before
from modhifi.runs.recipes.compare import CompareRecipe
from modhifi.runs.reports.head import head
from modhifi.runs.reports.measurements import EXPLAINED, measure_run
from modhifi.runs.reports.prune import skipped_warnings
from modhifi.runs.steady_memory import steady_memory
from modhifi.staging import staging

# Half the width of a 95 % interval, in standard errors of a share.
NORMAL = 1.96


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: its JSON-able report, and the directory written, if one was."""

    report: dict[str, Any]
    path: Path | None


@steady_memory()
def run_compare(
    recipe: CompareRecipe,
    *,
    device: torch.device | str = "cpu",
    given: Given = NOTHING,
    force: bool = False,
    cache: MomentCache | None = None,
    progress: Progress = silent,
    command: str = "",
) -> Comparison:
    """Measures a model once, prunes it with every selector, compensation and budget, and measures every result.

    A cell that fails, because its budget is out of reach for instance, is empty and says why. ``report["cells"]`` has a
    row for each; with ``out`` a directory holds ``report.json``, ``report.html`` and ``front.png``. Raises ModhifiError
    for bad input.
    """
    clock, budgets = Clock(progress, command), recipe.budgets()
    out = None if recipe.out is None else home_path(recipe.out)
    if out is not None:
        check_output(out, force, local_paths(recipe.model_dump()))
    with clock.stage("load"):
        original = given.seen_by(given.model or load_source(recipe.model))
        place(original, device, False)
        names = [(selector, compensate) for selector in recipe.selectors for compensate in recipe.compensate]
        completed = {name: complete(recipe.cell(*name), original, device) for name in names}
        common, warnings = completed[names[0]]
        rounding = rounding_for(original, device)
        settings = {name: replace(run.settings(), rounding=rounding) for name, (run, _) in completed.items()}
    with clock.stage("data"):
        calibration, held = load_data(common, original, given, clock.inner, seen_before(original))
        warnings = [*warnings, *warn_degenerate(calibration), *skipped_warnings(calibration, held)]
    with clock.stage("measure"):
        shared = measure_once(original, calibration, settings[names[0]], clock.inner, cache)
    cells: list[dict[str, Any]] = []
    with clock.stage("compare"):
        for selector in recipe.selectors:
            own = {compensate: settings[selector, compensate] for compensate in recipe.compensate}
            ordered, curves = order_once(shared, list(own.values()), clock.inner)
            for label, budget in budgets.items():
                for compensate, chosen in own.items():
                    progress("cells", len(cells), len(names) * len(budgets))
                    row = {"selector": selector, "compensate": compensate, "budget": label}
                    cells.append(row | _measure_cell(ordered, curves, budget, chosen, held))
    progress("cells", len(cells), len(cells))
    report = {
        **head("compare", original.source, framework=original.framework),
        "data": {
            "calibration": calibration.description,
            "held_out": held.description,
            "calibration_samples": len(calibration),
            "held_out_samples": len(held),
            **({"moments": cache.remark} if cache is not None and cache.remark else {}),
        },
        "settings": recipe.model_dump(mode="json"),
        "comparison": _compared(cells, original, held),
        "warnings": warnings,
        "command": command,
        "timing": clock.seconds,
    }
    _add_conclusions(report, [*budgets])
    return Comparison(report, None if out is None else _write(out, report))


def _measure_cell(
    measured: Measured, curves: Mapping[str, Curve], budget: Budget, settings: PruneSettings, held: Samples
) -> dict[str, Any]:
    """The figures of one cell; ``error`` says why there are none."""
    original = measured.loaded
    try:
        pruned = prune_measured(measured, curves, budget, settings)
        table = tabulate(original, pruned.model, held, settings.batch_size)
        figures = measure_run(original, pruned.model, held, table, settings.batch_size)
    except ModhifiError as error:
        return {"error": str(error)}
    errors, size, latency = figures["errors"], figures["size"], figures["latency"]
    return {
        "error": None,
        "flops": size["flops"][1] / size["flops"][0],
        "parameters": size["parameters"][1] / size["parameters"][0],
        "time": latency["after"]["ratio"],
        "seconds": [latency["before"]["median"], latency["after"]["median"]],
        "quality": _quality(original, errors),
        **errors,
    }


def _compared(cells: list[dict[str, Any]], original: LoadedModel, held: Samples) -> dict[str, Any]:
    """The comparison of all cells, those on a front marked; see :mod:`modhifi.artifacts.pareto`."""
    full = [cell for cell in cells if cell["error"] is None]
    shares = full and not original.gives_values
    noise = half_width(max(cell["quality"] for cell in full), len(held)) if shares else None
    on = fronts(full, noise or 0.0)
    for number, cell in enumerate(full):
        cell["front"] = [cost for cost in on if on[cost][number]]
    accuracy = full[0].get("accuracy_before") if full else None
    agreement = "next-token agreement" if original.kind == "text" else "agreement with the original"
    agreement = EXPLAINED if original.gives_values else agreement
    return {
        "quality": agreement if accuracy is None else "top-1 accuracy",
        "original_quality": 1.0 if accuracy is None else accuracy,
        "noise": noise,
        "perplexity_before": full[0].get("perplexity_before") if full else None,
        "cells": cells,
    }


def _quality(original: LoadedModel, errors: Mapping[str, Any]) -> float:
    """What the front is drawn of: accuracy where there are labels, else agreement; of values, the variance kept."""
    if original.gives_values:
        return float(errors["explained"] or 0.0)
    return float(errors.get("accuracy_after", errors["agreement"]))


def half_width(share: float, n: int) -> float:
    """Half the width of a 95 % interval of a share measured on ``n`` samples, above zero for shares of 0 and 1 too.

    One success and one failure are added (Agresti and Caffo 2000).
    """
    share = (n * share + 1) / (n + 2)
    return NORMAL * math.sqrt(share * (1 - share) / (n + 2))


def _add_conclusions(report: dict[str, Any], budgets: Sequence[str]) -> None:
    """Adds a table for every figure, the outcome in one sentence, and why cells are empty, in place."""
    comparison = report["comparison"]
    rows = dict.fromkeys((cell["selector"], cell["compensate"]) for cell in comparison["cells"])
    by_name = {(cell["selector"], cell["compensate"], cell["budget"]): cell for cell in comparison["cells"]}
    figures = {"quality": (comparison["quality"], "%"), "time": ("time of one sample, over the original's", "")}
    if comparison["perplexity_before"] is not None:
        figures["perplexity_after"] = (f"perplexity (original {comparison['perplexity_before']:.4g})", "")
    report["tables"] = [
        {
            "title": title[:1].upper() + title[1:],
            "columns": ["selector + compensation", *budgets],
            "rows": [[" + ".join(row), *(by_name[*row, b].get(key) for b in budgets)] for row in rows],
            "unit": unit,
        }
        for key, (title, unit) in figures.items()
    ]
    best: dict[str, Mapping[str, Any]] = {}
    for cell in measured(comparison):
        if cell["quality"] > best.get(cell["budget"], {"quality": -math.inf})["quality"]:
            best[cell["budget"]] = cell
    winners = [
        f"at {budget} {cell['selector']} + {cell['compensate']} ({100 * cell['quality']:.1f} %)"
        for budget, cell in best.items()
    ]
    start = f"Best {comparison['quality']} (original {100 * comparison['original_quality']:.1f} %)"
    text = f"{start}: {', '.join(winners)}." if winners else "Every cell is empty; the reasons are below."
    if winners:
        n = report["data"]["held_out_samples"]
        text += f" Measured on {n:,} held-out samples"
        noise = comparison["noise"]
        text += "." if noise is None else f": differences of less than {100 * noise:.1f} points may be chance."
    report["outcome"] = {"tone": "good" if winners else "bad", "text": text, "advice": []}
    report["warnings"] = [
        *report["warnings"],
        *(
            f"{cell['selector']} + {cell['compensate']} at {cell['budget']} is empty: {cell['error']}"
            for cell in comparison["cells"]
            if cell["error"] is not None
        ),
    ]


def _write(out: Path, report: Mapping[str, Any]) -> Path:
    content = jsonable(report)
    with staging(out.absolute()) as directory:
        (directory / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (directory / "report.html").write_text(render_html(content), "utf-8")
        if measured(report["comparison"]):
            write_png(directory / "front.png", report["comparison"], report["title"])
    return out
