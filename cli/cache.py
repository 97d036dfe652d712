"""The options that say where moments are kept between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", help="Keep moments here; by default $MODHIFI_CACHE or the user's cache directory."),
]
NoCacheOption = Annotated[bool, typer.Option("--no-cache", help="Neither use nor keep moments of other runs.")]


def cache_directory(cache: Path | None, off: bool) -> Path | None:
    """The directory that the options ask for, None where they forbid one."""
    from modhifi.disk import default_directory

    return None if off else cache or default_directory()
