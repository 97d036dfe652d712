"""Run any recipe: one step or several, each with its report, and the first failed check ends it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modhifi.artifacts.report import render_html
from modhifi.bounds.ladder import BoundReport
from modhifi.calibration.cache import MomentCache
from modhifi.calibration.distributed import launched
from modhifi.disk import check_output, jsonable
from modhifi.errors import GateFailed, ModhifiError, SelfTestFailed
from modhifi.progress import Progress, silent
from modhifi.runs.audit import run_audit
from modhifi.runs.inputs import original_of
from modhifi.runs.prune import run_prune
from modhifi.runs.recipe import PruneRecipe
from modhifi.runs.recipe_file import set_value, to_yaml
from modhifi.runs.recipe_tasks import STEP, AuditRecipe, Recipe, StepsRecipe, VerifyRecipe, parse
from modhifi.runs.unlearn import run_unlearn
from modhifi.runs.unlearn_recipe import UnlearnRecipe
from modhifi.runs.verify import verify_artifact
from modhifi.staging import staging
from modhifi.unlearning.audit_text import VERDICTS


@dataclass(frozen=True)
class Done:
    """A step that ran: its JSON-able report, where it was written, and the check that it failed, if it failed one."""

    name: str
    report: dict[str, Any]
    path: Path | None
    failure: GateFailed | SelfTestFailed | None = None


@dataclass(frozen=True)
class How:
    """The circumstances of a run: ``resolve`` turns a recipe's word for a device into a device; ``cache`` is the
    directory where moments are kept, if they are; ``command`` is what a report calls the way to repeat it."""

    resolve: Callable[[str], torch.device]
    force: bool = False
    cache: Path | None = None
    progress: Progress = silent
    command: str = ""


def run_recipe(recipe: Recipe, how: How) -> list[Done]:
    """Run a recipe of any task; of several steps the last one run is the one that failed, if one did.

    Raises ModhifiError for bad input and where several steps have nowhere to write.
    """
    if not isinstance(recipe, StepsRecipe):
        return [_run(recipe.task, recipe, how)]
    if recipe.out is None:
        raise ModhifiError("a recipe of several steps writes a directory for each; give --out DIR")
    if launched():
        raise ModhifiError("a recipe of several steps runs in one process; launch `modhifi prune` alone")
    out = Path(recipe.out).expanduser()
    check_output(out, how.force)
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(to_yaml(recipe.model_dump(mode="json")), encoding="utf-8")
    found: list[Done] = []
    for number, (label, content) in enumerate(_variants(recipe)):
        found = _run_steps(content, label, out, replace(how, force=how.force or number > 0))
        if found[-1].failure is None:
            break
    return found


def _variants(recipe: StepsRecipe) -> list[tuple[str, dict[str, Any]]]:
    """The recipe's content with each value of its sweep, most wanted first, and what to call that."""
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


def _run_steps(content: dict[str, Any], label: str, out: Path, how: How) -> list[Done]:
    found: list[Done] = []
    total = len(content["steps"])
    title = f"steps ({label})" if label else "steps"
    for number, (name, step) in enumerate(content["steps"].items()):
        how.progress(title, number, total)
        ready = parse({**_placed(step, out), "out": str(out / name)}, f"step {name}")
        assert not isinstance(ready, StepsRecipe)

        def inner(stage: str, done: int, of: int, name: str = name) -> None:
            how.progress(f"  {name}{f' {label}' if label else ''}: {stage}", done, of)

        found.append(_run(f"{name} ({label})" if label else name, ready, replace(how, progress=inner)))
        if found[-1].failure is not None:
            return found
    how.progress(title, total, total)
    return found


def _placed(content: Any, out: Path) -> Any:
    """The content with ``step:NAME`` replaced by that step's directory."""
    if isinstance(content, str) and content.startswith(STEP):
        return str(out / content.removeprefix(STEP))
    if isinstance(content, dict):
        return {key: _placed(value, out) for key, value in content.items()}
    return [_placed(value, out) for value in content] if isinstance(content, list) else content


def _run(name: str, recipe: PruneRecipe | UnlearnRecipe | VerifyRecipe | AuditRecipe, how: How) -> Done:
    device = how.resolve(recipe.device)
    if isinstance(recipe, PruneRecipe):
        pruned = run_prune(
            recipe,
            device=device,
            force=how.force,
            cache=None if how.cache is None else MomentCache(how.cache),
            progress=how.progress,
            command=how.command,
        )
        return Done(name, pruned.report, pruned.path, _caught(partial(_enforce, pruned.bounds)))
    if isinstance(recipe, UnlearnRecipe):
        edited = run_unlearn(recipe, device=device, force=how.force, progress=how.progress, command=how.command)
        failure = _caught(partial(_enforce, edited.bounds)) or _caught(partial(require_forgotten, edited.report))
        return Done(name, edited.report, edited.path, failure)
    out = None if recipe.out is None else Path(recipe.out).expanduser()
    if out is not None:
        check_output(out, how.force)
    if isinstance(recipe, VerifyRecipe):
        report, check = _verify(recipe, device, how.progress)
    else:
        report, check = _audit(recipe, device, how.progress)
    report |= {"settings": recipe.model_dump(mode="json"), "command": how.command}
    path = None if out is None else write_report(out, report, recipe.model_dump(mode="json"))
    return Done(name, report, path, _caught(check))


def _enforce(bounds: BoundReport | None) -> None:
    if bounds is not None:
        bounds.enforce()


def require_forgotten(report: Mapping[str, Any]) -> None:
    """Raise GateFailed where an unlearning run changed nothing."""
    if report["strength"]["of_the_full_edit"] == 0.0:
        raise GateFailed("nothing was forgotten: no strength stays within --retain-budget; allow a larger one")


def write_report(out: Path, report: Mapping[str, Any], recipe: Mapping[str, Any]) -> Path:
    """A directory with ``report.json``, ``report.html`` and ``recipe.yaml``, written whole or not at all."""
    content = jsonable(report)
    with staging(out.absolute()) as directory:
        (directory / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (directory / "report.html").write_text(render_html(content), "utf-8")
        (directory / "recipe.yaml").write_text(to_yaml(jsonable(recipe)), "utf-8")
    return out


def _caught(check: Callable[[], None]) -> GateFailed | SelfTestFailed | None:
    try:
        check()
    except (GateFailed, SelfTestFailed) as failure:
        return failure
    return None


def _verify(
    recipe: VerifyRecipe, device: torch.device, progress: Progress
) -> tuple[dict[str, Any], Callable[[], None]]:
    found = verify_artifact(
        recipe.directory,
        recipe.against or original_of(recipe.directory),
        recipe.data.source,
        recipe.checks.tolerances(),
        samples=recipe.data.samples,
        walked=recipe.checks.walked,
        allow_overlap=recipe.data.allow_overlap,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        device=device,
        progress=progress,
    )
    title = f"modhifi verify {recipe.directory}"
    content = found.to_json()
    return {
        "schema_version": 1,
        "title": title,
        "task": "verify",
        "model": {"source": recipe.directory},
        **content,
        "warnings": content["bounds"]["warnings"],
    }, found.enforce


def _audit(recipe: AuditRecipe, device: torch.device, progress: Progress) -> tuple[dict[str, Any], Callable[[], None]]:
    report = run_audit(
        recipe.directory,
        source=recipe.data.source,
        forget_names=recipe.forget,
        original=recipe.original,
        forget_source=recipe.data.forget,
        evaluate=recipe.data.evaluate,
        reference=recipe.reference,
        members=recipe.data.members,
        samples=recipe.data.samples,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        device=device,
        progress=progress,
    )
    checks, rows = recipe.checks, report["audit"]["rows"]
    verdict = report["audit"]["verdict"]
    if checks.at_least is not None:
        reached = VERDICTS.index(verdict) >= VERDICTS.index(checks.at_least)
        report["verdicts"].append(_check(f"at least {checks.at_least}", reached, f"the attacks found: {verdict}"))
    if checks.max_retain_loss is not None:
        loss = rows["original"]["retain"] - rows["edited"]["retain"]
        text = f"the other classes lost {100 * loss:.2f} points on {report['audit']['test_samples']} test images"
        report["verdicts"].append(
            _check(f"max retain loss {checks.max_retain_loss:g}", loss <= checks.max_retain_loss, text)
        )
    failed = [v for v in report["verdicts"] if v["verdict"] == "FAIL"]

    def enforce() -> None:
        for v in failed:
            raise GateFailed(f"{v['name']}: FAIL: {v['text']}")

    return report, enforce


def _check(name: str, holds: bool, text: str) -> dict[str, str]:
    return {"name": name, "verdict": "PASS-ON-SAMPLES" if holds else "FAIL", "text": text}
