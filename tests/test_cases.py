"""The table of cases names tests that exist, and every case once."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SECTIONS = {"A": 12, "B": 4, "C": 20, "D": 4}


def test_every_case_has_a_row_whose_tests_exist() -> None:
    text = (TESTS / "CASES.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-D]\d+) \| ([^|]+) \| ([^|]+) \|$", text, flags=re.M)
    assert [case for case, _, _ in rows] == [f"{s}{i}" for s, n in SECTIONS.items() for i in range(1, n + 1)]
    for case, _, column in rows:
        names = re.findall(r"`([\w/.]+)::(\w+)`", column)
        assert names and column.split() == [f"`{file}::{name}`" for file, name in names], case
        for file, name in names:
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in defined, f"{case}: {file} has no {name}"
