"""Files and folders that programs leave beside a user's data: they hold no data of the user's."""

from __future__ import annotations

from pathlib import Path


def is_hidden(path: Path) -> bool:
    """Whether a name is a program's own: ``.ipynb_checkpoints``, ``.cache``, ``._photo.jpg`` or ``__MACOSX``."""
    return path.name.startswith(".") or path.name == "__MACOSX"
