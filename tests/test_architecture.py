"""The rooms of the library import in one direction, and no two files import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import modhifi

ROOT = Path(modhifi.__file__).parent
# Each room knows those on the lines before its own, and none beside it.
FLOORS = (
    "errors",
    "progress registry staging",
    "cache disk",
    "structure",
    "models",
    "data",
    "calibration bounds artifacts",
    "pruning",
    "unlearning",
    "healing",
    "runs",
    "api",
    "cli recipes",
    "__init__ __main__",
)
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def imports(path: Path, name: str) -> Iterator[str]:
    """Every file of the package that a file imports, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*name.split(".")[: -node.level], *([node.module] if node.module else [])])
            if base.split(".")[0] == "modhifi":
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield inner if inner in FILES else base
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)


def files() -> dict[str, Path]:
    found = {}
    for root, prefix in ((ROOT, "modhifi"), (ROOT.parent / "cli", "modhifi.cli")):
        for path in root.rglob("*.py"):
            found[".".join([prefix, *path.relative_to(root).with_suffix("").parts])] = path
    return found


FILES = files()


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    """What every file imports; not read while tests are collected, which every worker does."""
    return {name: {to for to in imports(path, name) if to in FILES} for name, path in FILES.items()}


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_room_has_a_floor():
    assert {room(name) for name in FILES} <= set(HEIGHT)


def test_no_file_imports_from_above_or_from_a_neighbour(arrows: dict[str, set[str]]):
    wrong = [
        f"{name} -> {to}"
        for name, tos in arrows.items()
        for to in tos
        if room(to) != room(name) and HEIGHT[room(to)] >= HEIGHT[room(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle(arrows: dict[str, set[str]]):
    TopologicalSorter(arrows).prepare()  # raises CycleError with the circle
