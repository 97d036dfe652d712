"""`modhifi audit`: attack a model that was made to forget."""

from __future__ import annotations

from pathlib import Path

from modhifi.runs.recipes.tasks import AuditRecipe

from .common import ForceOption, JsonOption, QuietOption
from .options import takes
from .run import run


@takes(AuditRecipe)
def audit(
    recipe: AuditRecipe,
    file: Path | None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Try to get forgotten classes back: norms re-estimated, probes, neighbours, prototypes; beside an output mask."""
    run(recipe, quiet=quiet, as_json=as_json, force=force, file=file)
