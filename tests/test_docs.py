"""The Python of the pages under docs/ and of the README runs as it stands, page by page, offline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import modhifi

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/quickstart.md", "docs/own-model.md", "docs/own-data.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    if any('load("small")' in block for block in blocks):  # what the commands above it wrote
        small = {"samples": 16, "evaluation_samples": 16, "checks": {"walked": 0}, "out": "small"}
        modhifi.prune("demo:resnet", "demo:calibration", ratio=0.2, **small)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
