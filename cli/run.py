"""Running a recipe from the command line: its report on stdout, then the exit code of its checks."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from modhifi.cache import default_directory
from modhifi.runs.recipes.tasks import Recipe, StepsRecipe

from .common import annotate, imported_for_good, print_json, progress
from .push import check_pushed, pushed
from .screens import show_briefly, show_report

if TYPE_CHECKING:
    from modhifi.runs.run_task import Done


def run(
    recipe: Recipe,
    *,
    quiet: bool,
    as_json: bool,
    force: bool = False,
    dry_run: bool = False,
    cache: Path | None = None,
    no_cache: bool = False,
    push_to_hub: str | None = None,
    file: Path | None = None,
    ladder: bool = False,
) -> list[Done]:
    """Runs a recipe and prints the report of each step; raises the failure of a check after everything is written.

    ``file`` is where the recipe was read from; ``ladder`` shows the bounds of a verification one by one.
    """
    # Whoever asks for help does not wait for the libraries of models.
    with imported_for_good():
        importlib.import_module("timm")
    from modhifi.runs.run_recipe import run_recipe
    from modhifi.runs.run_task import Circumstances

    check_pushed(push_to_hub, None if dry_run else recipe.out)
    with progress(quiet or as_json) as report:
        finished = run_recipe(
            recipe,
            Circumstances(
                dry_run=dry_run,
                force=force,
                reads=() if file is None else (file,),
                cache=None if no_cache else cache or default_directory(),
                progress=report,
                command=shlex.join(["modhifi", *sys.argv[1:]]),
            ),
        )
    if not finished[-1].report:
        raise typer.Exit()  # the main process of several goes on
    if as_json:
        steps = isinstance(recipe, StepsRecipe)
        print_json([_content(d) | {"step": d.name} for d in finished] if steps else _content(finished[0]))
    else:
        for done in finished:
            if quiet and not ladder:
                show_briefly(done.report, done.path, done.name if isinstance(recipe, StepsRecipe) else None)
            else:
                show_report(done.report, done.path, ladder=ladder)
    for done in finished:
        for text in done.report["warnings"]:
            annotate("warning", text)
    if finished[-1].failure is not None:
        raise finished[-1].failure
    pushed(finished[-1].path, push_to_hub)
    return finished


def _content(done: Done) -> dict[str, Any]:
    from modhifi.runs.prune import PruneResult

    plan = {"plan": done.result.plan.to_json()} if isinstance(done.result, PruneResult) else {}
    return {**done.report, **plan, "path": None if done.path is None else str(done.path)}
