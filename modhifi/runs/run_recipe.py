"""Running a recipe of any task: one step or several, each with its report, until a check fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modhifi.artifacts.summary import check_summary, write_summary
from modhifi.calibration.distributed import launched
from modhifi.disk import RECIPE, check_output, home_path, leftovers, steps_of, unfinished
from modhifi.errors import GateFailed, ModhifiError, OutOfReach
from modhifi.runs.inputs import local_paths, located
from modhifi.runs.recipes.files import set_value, to_yaml
from modhifi.runs.recipes.tasks import STEP, Recipe, StepsRecipe, parse
from modhifi.runs.run_task import Circumstances, Done, run_task

# A label, and the content of a recipe.
Variant = tuple[str, dict[str, Any]]
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
        finished = [run_task(recipe.task, recipe, circumstances)]
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
    replaced = steps_of(out) - recipe.steps.keys()
    for name, step in leftovers(out).items():  # only a step of the same name goes on from its state
        if step in replaced or name.endswith(".log"):
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
    for step in replaced:
        _remove(out / step)
    return finished


def _first_that_holds(variants: Sequence[Variant], out: Path, circumstances: Circumstances) -> list[Done]:
    """Runs each of the variants until no check of one fails; a budget out of reach fails, too.

    What an earlier variant wrote for steps that a later one does not come to goes: it is of a model that is gone.
    """
    finished: list[Done] = []
    for number, (label, content) in enumerate(variants):
        force = circumstances.force or number > 0
        before, reached = finished, list[Done]()
        try:
            for done in _run_steps(content, label, out, replace(circumstances, force=force)):
                reached.append(done)
            if reached[-1].failure is None:
                return reached
        except OutOfReach as error:
            if number + 1 == len(variants) and (reached or not before):
                raise
            if not reached and before:  # what is there is the earlier variant's, as it was written
                told = f"{before[-1].failure}; {label} is out of reach: {error}"
                finished = [*before[:-1], replace(before[-1], failure=GateFailed(told))]
        if reached:
            for name in [*content["steps"]][len(reached) : len(before)]:
                _remove(out / name)
            finished = reached
    return finished


def _remove(step: Path) -> None:
    if step.is_dir() and not step.is_symlink():
        shutil.rmtree(step)


def _ended_early(out: Path, written: str) -> bool:
    """Whether a directory holds an ended run of the same recipe, which is to go on."""
    try:
        return (out / RECIPE).read_text(encoding="utf-8") == written and any(out.glob(unfinished(Path("*"))))
    except OSError:
        return False


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


def _run_steps(content: dict[str, Any], label: str, out: Path, circumstances: Circumstances) -> Iterator[Done]:
    """Every step as soon as it is done, as far as the first one that fails."""
    progress, total = circumstances.progress, len(content["steps"])
    title = f"steps ({label})" if label else "steps"
    for number, (name, step) in enumerate(content["steps"].items()):
        progress(title, number, total)
        recipe = parse({**_placed(step, out), "out": str(out / name)}, f"step {name}")
        assert not isinstance(recipe, StepsRecipe)

        def inner(stage: str, done: int, of_total: int, name: str = name) -> None:
            progress(f"  {name}{f' {label}' if label else ''}: {stage}", done, of_total)

        full_name = f"{name} ({label})" if label else name
        done = run_task(full_name, recipe, replace(circumstances, progress=inner))
        _summarise(recipe, [done])
        yield done
        if done.failure is not None:
            return
    progress(title, total, total)


def _placed(content: Any, out: Path) -> Any:
    """The content with ``step:NAME`` replaced by that step's directory."""
    if isinstance(content, str) and content.startswith(STEP):
        return str(out / content.removeprefix(STEP))
    if isinstance(content, dict):
        return {key: _placed(value, out) for key, value in content.items()}
    return [_placed(value, out) for value in content] if isinstance(content, list) else content
