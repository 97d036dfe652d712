"""The option `--push-to-hub` of the verbs that write artefacts."""

from __future__ import annotations

from pathlib import Path

import typer

from modhifi.errors import ModhifiError


def check_pushed(repo: str | None, out: str | Path | None) -> None:
    """Raises ModhifiError, before any work, for an upload of nothing, a bad name or no login."""
    if repo is None:
        return
    from modhifi.artifacts.push import check_push

    if out is None:
        raise ModhifiError(
            "--push-to-hub uploads what a run writes and this one writes nothing; give --out DIR, without --dry-run"
        )
    check_push(repo)


def pushed(path: Path | None, repo: str | None) -> None:
    """Uploads the artefact, if that was asked for, and prints its URL."""
    if path is None or repo is None:
        return
    from modhifi.artifacts.push import push

    typer.echo(f"uploaded: {push(path, repo)}", err=True)
