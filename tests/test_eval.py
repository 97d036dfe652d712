"""The scripts of eval/ are not run here, but what they take from the package is there."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parent.parent / "eval").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modhifi"):
            module = importlib.import_module(str(node.module))
            rooms = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))]
            assert not [
                alias.name for alias in node.names if not hasattr(module, alias.name) and alias.name not in rooms
            ]
