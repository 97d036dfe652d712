"""`modhifi verify`: how far did the outputs of an edited model move, and is that within a tolerance?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modhifi.runs.recipes.tasks import VerifyRecipe

from .common import ForceOption, JsonOption, QuietOption
from .options import takes
from .run import run


@takes(VerifyRecipe)
def verify(
    recipe: VerifyRecipe,
    file: Path | None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Also print every bound with its assumptions.", rich_help_panel="Output"),
    ] = False,
) -> None:
    """Bound how far an edited model's outputs moved: every rung labelled, with a verdict on each tolerance.

    Exit code 0 where every tolerance given is met, 1 where one is not or stays open, 3 if the self-test fails.
    """
    run(recipe, quiet=quiet, as_json=as_json, force=force, file=file, ladder=verbose)
