"""Running a recipe of any task: one step or several, each with its report, until a check fails."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modhifi.artifacts.formatting import noisy
from modhifi.artifacts.report import render_html
from modhifi.artifacts.summary import check_summary, write_summary
from modhifi.bounds.ladder import BoundReport
from modhifi.calibration.cache import MomentCache
from modhifi.calibration.distributed import launched
from modhifi.disk import MANIFEST, RECIPE, check_file, check_output, foreign, home_path, jsonable, leftovers, unfinished
from modhifi.errors import GateFailed, ModhifiError, OutOfReach, SelfTestFailed
from modhifi.progress import Progress, live_log, silent
from modhifi.runs.audit import run_audit
from modhifi.runs.devices import resolve_device
from modhifi.runs.heal import HealResult, run_heal
from modhifi.runs.inputs import NOTHING, Given, local_paths, located
from modhifi.runs.prune import PruneResult, run_prune
from modhifi.runs.recipes.files import set_value, to_yaml
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.runs.recipes.tasks import STEP, Recipe, StepsRecipe, Task, VerifyRecipe, parse
from modhifi.runs.recipes.unlearn import UnlearnRecipe
from modhifi.runs.reports.head import head
from modhifi.runs.reports.outcome import add_outcome
from modhifi.runs.reports.prune import too_busy
from modhifi.runs.unlearn import UnlearnResult, run_unlearn
from modhifi.runs.verify import run_verify
from modhifi.staging import staging

# A label, and the content of a recipe.
Variant = tuple[str, dict[str, Any]]
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


DEFAULTS = Circumstances()


def run_recipe(recipe: Recipe, circumstances: Circumstances = DEFAULTS) -> list[Done]:
    """Runs a recipe of any task; where a step fails, it is the last one returned.

    Raises ModhifiError for bad input and where several steps have nowhere to write.
    """
    for part in (recipe, *(recipe.steps.values() if isinstance(recipe, StepsRecipe) else ())):
        if part.summary is not None:
            check_summary(Path(part.summary), None if circumstances.dry_run else recipe.out)
    if isinstance(recipe, StepsRecipe):
        finished = _run_all(recipe, circumstances)
    else:
        finished = [_run(recipe.task, recipe, circumstances)]
    _summarise(recipe, finished)
    return finished


def _summarise(recipe: Recipe, finished: list[Done]) -> None:
    # Of several processes only the main one has a report.
    if recipe.summary is not None and finished[-1].report:
        write_summary(Path(recipe.summary), [(done.name, done.report) for done in finished])


def _run_all(recipe: StepsRecipe, circumstances: Circumstances) -> list[Done]:
    if recipe.out is None:
        raise ModhifiError("a recipe of several steps writes a directory for each; give --out DIR")
    if launched():
        raise ModhifiError("a recipe of several steps runs in one process; launch `modhifi prune` alone")
    out, variants = home_path(recipe.out).absolute(), _variants(recipe)
    written = to_yaml(located(recipe.model_dump(mode="json")))
    circumstances = replace(circumstances, force=circumstances.force or _ended_early(out, written))
    check_output(out, circumstances.force, (*circumstances.reads, *local_paths(recipe.model_dump())))
    is_new = not out.exists()
    for name, step in leftovers(out).items():  # only a step of the same name goes on from its state
        if step not in recipe.steps or name.endswith(".log"):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / RECIPE).write_text(written, encoding="utf-8")
    try:
        finished = _first_that_holds(variants, out, circumstances)
    except BaseException:
        # Of bad input nothing stays that would have to be replaced.
        if [path.name for path in out.iterdir()] == [RECIPE]:
            (out / RECIPE).unlink()
            if is_new:
                out.rmdir()
        raise
    if circumstances.force:
        _remove_other_steps(out, recipe)
    return finished


def _first_that_holds(variants: Sequence[Variant], out: Path, circumstances: Circumstances) -> list[Done]:
    """Runs each of the variants until no check of one fails; a budget out of reach fails, too."""
    finished: list[Done] = []
    for number, (label, content) in enumerate(variants):
        force = circumstances.force or number > 0
        try:
            finished = _run_steps(content, label, out, replace(circumstances, force=force))
        except OutOfReach:
            if number + 1 == len(variants):
                raise
            continue
        if finished[-1].failure is None:
            break
    return finished


def _ended_early(out: Path, written: str) -> bool:
    """Whether a directory holds an ended run of the same recipe, which is to go on."""
    try:
        return (out / RECIPE).read_text(encoding="utf-8") == written and any(out.glob(unfinished(Path("*"))))
    except OSError:
        return False


def _remove_other_steps(out: Path, recipe: StepsRecipe) -> None:
    """Removes what an earlier recipe left in a directory that this one replaced."""
    for path in out.iterdir():
        if path.name not in recipe.steps and path.is_dir() and not path.is_symlink() and foreign(path) is None:
            shutil.rmtree(path)


def _variants(recipe: StepsRecipe) -> list[Variant]:
    """The label and content of the recipe with each value of its sweep, most wanted first."""
    plain = recipe.model_dump(mode="json", exclude={"sweep"})
    if not recipe.sweep:
        return [("", plain)]
    ((path, values),) = recipe.sweep.items()
    variants = []
    for value in values:
        content = json.loads(json.dumps(plain))
        set_value(content, path, value)
        parse(content, f"the sweep's {path}={value}")
        variants.append((f"{path.removeprefix('steps.')}={value}", content))
    return variants


def _run_steps(content: dict[str, Any], label: str, out: Path, circumstances: Circumstances) -> list[Done]:
    finished: list[Done] = []
    progress, total = circumstances.progress, len(content["steps"])
    title = f"steps ({label})" if label else "steps"
    for number, (name, step) in enumerate(content["steps"].items()):
        progress(title, number, total)
        recipe = parse({**_placed(step, out), "out": str(out / name)}, f"step {name}")
        assert not isinstance(recipe, StepsRecipe)

        def inner(stage: str, done: int, of_total: int, name: str = name) -> None:
            progress(f"  {name}{f' {label}' if label else ''}: {stage}", done, of_total)

        full_name = f"{name} ({label})" if label else name
        finished.append(_run(full_name, recipe, replace(circumstances, progress=inner)))
        _summarise(recipe, finished[-1:])
        if finished[-1].failure is not None:
            return finished
    progress(title, total, total)
    return finished


def _placed(content: Any, out: Path) -> Any:
    """The content with ``step:NAME`` replaced by that step's directory."""
    if isinstance(content, str) and content.startswith(STEP):
        return str(out / content.removeprefix(STEP))
    if isinstance(content, dict):
        return {key: _placed(value, out) for key, value in content.items()}
    return [_placed(value, out) for value in content] if isinstance(content, list) else content


def _run(name: str, recipe: Task, circumstances: Circumstances) -> Done:
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
        if (out.absolute().parent / MANIFEST).is_file():
            raise ModhifiError(
                f"{out} would be a file of an artefact, which stays as it was written; give another place"
            )
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
        (directory / "recipe.yaml").write_text(to_yaml(located(jsonable(recipe))), "utf-8")
    return out
