"""What `--push-to-hub` does for the verbs that write artefacts."""

from __future__ import annotations

from pathlib import Path

import typer

from modhifi.errors import ModhifiError


def check_pushed(repo: str | None, out: str | Path | None) -> None:
    """Raise ModhifiError, before the work, for an upload of nothing, a bad name or no login."""
    if repo is None:
        return
    from modhifi.artifacts.push import check_push

    if out is None:
        raise ModhifiError(
            "--push-to-hub uploads what a run writes and this one writes nothing; give --out DIR, without --dry-run"
        )
    check_push(repo)


def pushed(path: Path | None, repo: str | None) -> None:
    """Upload what was written, if that was asked for, and say where it is."""
    if path is None or repo is None:
        return
    from modhifi.artifacts.push import push

    typer.echo(f"uploaded: {push(path, repo)}", err=True)
