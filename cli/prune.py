"""`modhifi prune`: one command from a model to a smaller one with its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modhifi.errors import ModhifiError
from modhifi.runs.recipes.prune import PruneRecipe

from .common import CacheOption, ForceOption, JsonOption, NoCacheOption, PushOption, QuietOption
from .options import takes
from .run import run


@takes(PruneRecipe)
def prune(
    recipe: PruneRecipe,
    file: Path | None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan and the predicted size; write nothing.", rich_help_panel="Output"
        ),
    ] = False,
    push_to_hub: PushOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Make a model physically smaller, without its training data, labels or gradients."""
    if recipe.out is None and not dry_run:
        raise ModhifiError("give --out DIR for the pruned model, or --dry-run to see the plan only")
    run(
        recipe,
        quiet=quiet,
        as_json=as_json,
        force=force,
        dry_run=dry_run,
        cache=cache,
        no_cache=no_cache,
        push_to_hub=push_to_hub,
        file=file,
    )
