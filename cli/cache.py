"""`modhifi cache`: what earlier runs left for later ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import JsonOption, print_json


def cache(
    directory: Annotated[
        Path | None,
        typer.Option("--cache", help="Look here; by default $MODHIFI_CACHE or the user's cache directory."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove every entry.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where moments and drawn images are kept and how large they are, or remove them.

    They take at most $MODHIFI_CACHE_LIMIT GiB (2 by default); those used longest ago go first.
    """
    from modhifi.artifacts.report import number
    from modhifi.cache import Cache, default_directory

    store = Cache(directory or default_directory())
    if clear:
        store.clear()
    sizes = [facts.st_size for facts in store.entries().values()]
    if as_json:
        print_json({"path": str(store.directory), "entries": len(sizes), "bytes": sum(sizes), "limit": store.limit})
    else:
        space = f"{number(sum(sizes), 'B')} of {number(store.limit, 'B')}"
        typer.echo(f"{store.directory}: {len(sizes)} {'entry' if len(sizes) == 1 else 'entries'}, {space}")
