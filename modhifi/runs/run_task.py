"""Running a recipe of one task, with its log, its report and the check that fails."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modhifi.artifacts.formatting import noisy
from modhifi.artifacts.report import render_html
from modhifi.bounds.ladder import BoundReport
from modhifi.calibration.cache import MomentCache
from modhifi.disk import RECIPE, check_file, check_output, home_path, jsonable
from modhifi.errors import GateFailed, SelfTestFailed
from modhifi.progress import Progress, live_log, silent
from modhifi.runs.audit import run_audit
from modhifi.runs.devices import resolve_device
from modhifi.runs.heal import HealResult, run_heal
from modhifi.runs.inputs import NOTHING, Given, local_paths, located
from modhifi.runs.prune import PruneResult, run_prune
from modhifi.runs.recipes.files import to_yaml
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.runs.recipes.tasks import Task, VerifyRecipe
from modhifi.runs.recipes.unlearn import UnlearnRecipe
from modhifi.runs.reports.head import head
from modhifi.runs.reports.outcome import add_outcome
from modhifi.runs.reports.prune import too_busy
from modhifi.runs.unlearn import UnlearnResult, run_unlearn
from modhifi.runs.verify import run_verify
from modhifi.staging import staging

# The endings of a report's file; any other name is a directory's.
REPORTS = (".json", ".html")


@dataclass(frozen=True)
class Done:
    """A finished step: its JSON-able report, the path written, and the check that failed, if one did.

    ``result`` holds the objects that JSON cannot: models, a plan, bounds.
    """

    name: str
    report: dict[str, Any]
    path: Path | None
    failure: GateFailed | SelfTestFailed | None = None
    result: PruneResult | UnlearnResult | HealResult | BoundReport | None = None


@dataclass(frozen=True)
class Circumstances:
    """The settings of a run that its recipe does not record.

    ``device`` and ``given`` take the place of what the recipe names; ``dry_run`` plans and writes nothing; ``force``
    replaces what is there, but for ``reads``, the files that the recipe came from; ``cache`` is the directory where
    moments are kept, None for none; ``command`` is the report's command that repeats the run.
    """

    device: torch.device | str | None = None
    given: Given = NOTHING
    dry_run: bool = False
    force: bool = False
    reads: tuple[Path, ...] = ()
    cache: Path | None = None
    progress: Progress = silent
    command: str = ""


def run_task(name: str, recipe: Task, circumstances: Circumstances) -> Done:
    writes = (
        isinstance(recipe, PruneRecipe | UnlearnRecipe | HealRecipe)
        and not circumstances.dry_run
        and recipe.out is not None
    )
    with live_log(home_path(str(recipe.out)) if writes else None):
        return _run_task(name, recipe, circumstances)


def _run_task(name: str, recipe: Task, circumstances: Circumstances) -> Done:
    device = resolve_device(recipe.device if circumstances.device is None else circumstances.device)
    given, progress = circumstances.given, circumstances.progress
    force, reads, command = circumstances.force, circumstances.reads, circumstances.command
    if isinstance(recipe, PruneRecipe):
        pruned = run_prune(
            recipe,
            device=device,
            dry_run=circumstances.dry_run,
            given=given,
            force=force,
            reads=reads,
            cache=None if circumstances.cache is None else MomentCache(circumstances.cache),
            progress=progress,
            command=command,
        )
        failure = _failure(pruned.bounds) or (
            _uncertain_time(pruned.report) if recipe.checks.tolerances().given else None
        )
        return Done(name, pruned.report, pruned.path, failure, pruned)
    if isinstance(recipe, UnlearnRecipe):
        unlearned = run_unlearn(
            recipe, device=device, given=given, force=force, reads=reads, progress=progress, command=command
        )
        failure = _failure(unlearned.bounds) or _nothing_forgotten(unlearned.report)
        return Done(name, unlearned.report, unlearned.path, failure, unlearned)
    if isinstance(recipe, HealRecipe):
        healed = run_heal(
            recipe, device=device, given=given, force=force, reads=reads, progress=progress, command=command
        )
        return Done(name, healed.report, healed.path, _failed_check(healed.report) or _failure(healed.bounds), healed)
    out = None if recipe.out is None else home_path(recipe.out)
    check_report(out, force, (*reads, *local_paths(recipe.model_dump())))
    bounds: BoundReport | None = None
    start = time.perf_counter()
    if isinstance(recipe, VerifyRecipe):
        bounds, recipe = run_verify(recipe, device=device, given=given, progress=progress)
        report = {
            **head("verify", recipe.directory),
            **bounds.to_json(),
            "warnings": list(bounds.warnings),
        }
        add_outcome(report, bounds)
        failure = _failure(bounds)
    else:
        report = run_audit(recipe, device=device, given=given, progress=progress)
        failure = _failed_check(report)
    content = recipe.model_dump(mode="json")
    report |= {"settings": content, "command": command}
    report.setdefault("timing", {recipe.task: time.perf_counter() - start})
    path = None if out is None else write_report(out, report, content)
    return Done(name, report, path, failure, bounds)


def _failure(bounds: BoundReport | None) -> GateFailed | SelfTestFailed | None:
    """The error of the first tolerance that is not met, None where all are."""
    try:
        if bounds is not None:
            bounds.enforce()
    except (GateFailed, SelfTestFailed) as failure:
        return failure
    return None


def _uncertain_time(report: Mapping[str, Any]) -> GateFailed | None:
    """The error of a budget of time whose measurement cannot tell the model from the original."""
    metered = report.get("metered")
    if metered is None or not noisy(metered["taken"]["measured"], metered["taken"]["spread"]):
        return None
    return GateFailed(too_busy(metered["taken"]["measured"], metered["taken"]["spread"]))


def _nothing_forgotten(report: Mapping[str, Any]) -> GateFailed | None:
    if report["strength"]["of_the_full_edit"] > 0.0:
        return None
    return GateFailed("nothing was forgotten: no strength stays within --retain-budget; allow a larger one")


def _failed_check(report: Mapping[str, Any]) -> GateFailed | None:
    failed = next((v for v in report.get("verdicts", []) if v["verdict"] == "FAIL"), None)
    return None if failed is None else GateFailed(f"{failed['name']}: FAIL: {failed['text']}")


def check_report(out: Path | None, force: bool, reads: Iterable[Path] = ()) -> None:
    """Raises ModhifiError, before any work, where a report could not be written."""
    if out is None:
        return
    if out.suffix in REPORTS:
        check_file(out, "--out", json="figures", html="a page")
    else:
        check_output(out, force, reads)


def write_report(out: Path, report: Mapping[str, Any], recipe: Mapping[str, Any]) -> Path:
    """Writes a report as a directory or, by the ending of ``out``, as one file; returns ``out``.

    The directory holds ``report.json``, ``report.html`` and ``recipe.yaml`` and is written whole or not at all.
    """
    content = jsonable(report)
    figures, page = json.dumps(content, indent=1, ensure_ascii=False) + "\n", render_html(content)
    if out.suffix in REPORTS:
        out.write_text(page if out.suffix == ".html" else figures, "utf-8", errors="backslashreplace")
        return out
    with staging(out.absolute()) as directory:
        (directory / "report.json").write_text(figures, "utf-8", errors="backslashreplace")
        (directory / "report.html").write_text(page, "utf-8")
        (directory / RECIPE).write_text(to_yaml(located(jsonable(recipe))), "utf-8")
    return out
