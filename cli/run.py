"""Run a recipe, show what it found, and end with the exit code of its checks."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import typer

from modhifi.cache import default_directory
from modhifi.runs.prune import PruneResult
from modhifi.runs.recipe_tasks import Recipe, StepsRecipe
from modhifi.runs.run_recipe import Circumstances, Done, run_recipe

from .common import print_json, progress
from .push import check_pushed, pushed
from .screens import show_report


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
) -> list[Done]:
    """Run a recipe and print its reports, of several steps each; raises the failure of a check after all is written."""
    check_pushed(push_to_hub, None if dry_run else recipe.out)
    with progress(quiet or as_json) as report:
        finished = run_recipe(
            recipe,
            Circumstances(
                dry_run=dry_run,
                force=force,
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
            show_report(done.report, done.path)
    if finished[-1].failure is not None:
        raise finished[-1].failure
    pushed(finished[-1].path, push_to_hub)
    return finished


def _content(done: Done) -> dict[str, Any]:
    plan = {"plan": done.result.plan.to_json()} if isinstance(done.result, PruneResult) else {}
    return {**done.report, **plan, "path": None if done.path is None else str(done.path)}
