"""Where an artefact goes: asked for before the work, filled in a sibling, moved into place at the end."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from modhifi.errors import ModhifiError


def jsonable(value: Any) -> Any:
    """The value with tuples as lists, tensors and numpy numbers as plain ones, paths as text.

    NaN becomes null; an infinity, which JSON has not got, the text ``Infinity`` or ``-Infinity``.
    """
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return None if math.isnan(value) else value
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [jsonable(v) for v in value]
    return str(value)


# The cache takes at most this share of what is free on its disk; the files used longest ago go first.
SHARE = 0.1


def default_directory() -> Path:
    """``$MODHIFI_CACHE``, or ``modhifi`` in the user's cache directory."""
    named = os.environ.get("MODHIFI_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modhifi"


def make_room(path: Path, needed: int) -> bool:
    """Whether a file of ``needed`` bytes may be written to ``path``; older ones beside it are removed for it."""
    directory = path.parent
    directory.mkdir(parents=True, exist_ok=True)
    files = {other: other.stat() for other in directory.glob("*.safetensors") if other != path}
    used = sum(s.st_size for s in files.values())
    limit = (shutil.disk_usage(directory).free + used) * SHARE
    if needed > limit:
        return False
    for other, facts in sorted(files.items(), key=lambda item: item[1].st_mtime):
        if used + needed <= limit:
            break
        other.unlink(missing_ok=True)
        used -= facts.st_size
    return True


def check_output(out: str | Path, force: bool = False) -> None:
    """Raise ModhifiError if an artefact could not be written to ``out``: ask before the work, not after it."""
    out = Path(out).expanduser().absolute()
    if out.exists() and not out.is_dir():
        raise ModhifiError(f"{out} is a file; give a directory")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise ModhifiError(f"{out} is not empty; give another directory, or --force to replace it")
        # Replacing a directory deletes all that is in it.
        if any(place.is_relative_to(out.resolve()) for place in (Path.cwd(), Path.home())):
            raise ModhifiError(f"{out} holds the current or the home directory and is not replaced; give another one")
    place = out if _stays(out) else out.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ModhifiError(f"cannot write to {place}; give --out a directory that can be written")


def check_file(path: Path | None, option: str, *, within: str | Path | None = None, **endings: str) -> None:
    """Raise ModhifiError if a file could not be written to ``path``: ask before the work, not after it.

    ``endings`` are what the format may be, each with its name, ``md="Markdown"`` say. ``within`` is a directory that
    the work makes.
    """
    if path is None:
        return
    if path.suffix.removeprefix(".") not in endings:
        formats = " or ".join(f".{ending} ({name})" for ending, name in endings.items())
        raise ModhifiError(f"{option} {path}: the ending says the format; use {formats}")
    made = within is not None and path.absolute().is_relative_to(Path(within).expanduser().absolute())
    if not made and not path.absolute().parent.is_dir():
        raise ModhifiError(f"{option} {path}: there is no directory {path.parent}; make it first")


def _stays(out: Path) -> bool:
    """Whether ``out`` exists and cannot be replaced as a whole: a mount point, or in a parent that is not ours."""
    return out.is_dir() and (os.path.ismount(out) or not os.access(out.parent, os.W_OK | os.X_OK))


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of ``out`` if the block ends well and vanishes if it does not."""
    place = out if _stays(out) else out.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=place) as folder:
            # mkdtemp's own directory is private to this user: the artefact is a plain one inside it.
            fresh, old = Path(folder) / "new", Path(folder) / "old"
            fresh.mkdir()
            yield fresh
            old.mkdir()
            if place == out:
                _move([path for path in out.iterdir() if path != Path(folder)], old)
                _move(list(fresh.iterdir()), out)
            elif out.exists():
                kept = old / out.name
                os.replace(out, kept)
                try:
                    os.replace(fresh, out)
                except BaseException:
                    os.replace(kept, out)
                    raise
            else:
                os.replace(fresh, out)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModhifiError(f"cannot write {out}: {why}; check space and permissions") from error


def _move(paths: list[Path], to: Path) -> None:
    for path in paths:
        os.replace(path, to / path.name)
