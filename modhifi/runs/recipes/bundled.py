"""The recipes that come with the package, by names such as ``prune/timm-resnet``."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from modhifi.disk import home_path
from modhifi.errors import ModhifiError

ROOT = Path(str(files("modhifi.recipes")))


def shipped() -> dict[str, Path]:
    """The name and file of every recipe of the package."""
    return {p.relative_to(ROOT).with_suffix("").as_posix(): p for p in sorted(ROOT.rglob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a recipe, from a path or the name of one of the package; raises ModhifiError if it is neither."""
    known = shipped()
    if name in known:
        return known[name]
    path = home_path(name)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"is {close[0]} meant?" if close else "`modhifi recipe ls` lists those of the package"
    raise ModhifiError(f"there is no recipe {name}; {hint}")


def summary(path: Path) -> str:
    """The purpose of a recipe: its first comment line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
