"""The pages under docs/ and the README: their Python runs as it stands, and what they name is there."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import modhifi
from modhifi.cli.main import VERBS, load

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/quickstart.md", "docs/own-model.md", "docs/own-data.md", "docs/after-pruning.md"]
ALL_PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"] + [
    str(path.relative_to(ROOT)) for folder in ("docs", "modhifi") for path in sorted((ROOT / folder).rglob("*.md"))
]
# Of the scripts of eval/ and of other tools.
OTHER_OPTIONS = {
    "--index-url",
    "--no-cache-dir",
    "--no-deps",
    "--rm",
    "--part",
    "--images",
    "--model",
    "--windows",
    "--model_args",
    "--multi_gpu",
    "--cpu",
    "--nproc_per_node",
    "--outfile",
    "--outtype",
} | {f"--{name}" for name in ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")}


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of every verb."""

    def of(command: Any) -> set[str]:
        own = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        return own.union(*(of(inner) for inner in getattr(command, "commands", {}).values()), {"--help"})

    return set().union(*(of(load(verb)) for verb in VERBS))


# Their examples heal, export and quantise, or prune several times; those of the README are the first of them.
SLOW = {"docs/quickstart.md", "docs/after-pruning.md", "docs/own-data.md", "docs/own-model.md"}


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in PAGES])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    if any(
        'load("small")' in block and 'out="small"' not in "".join(blocks) for block in blocks
    ):  # what the commands above it wrote
        small = {"samples": 16, "evaluation_samples": 16, "checks": {"walked": 0}, "out": "small"}
        modhifi.prune("demo:resnet", "demo:calibration", ratio=0.2, **small)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", ALL_PAGES)
def test_what_a_page_names_is_there(page: str, options: set[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    places = (ROOT, ROOT / "modhifi", (ROOT / page).parent)
    files = {*re.findall(r"[\w.-]*/[\w./-]+\.(?:py|md|json|png)\b", text), *re.findall(r"\]\(([\w./-]+)\)", text)}
    assert not [file for file in files if not any((place / file).exists() for place in places)]
    names = set(re.findall(r"\bmodhifi(?:\.[a-z_]\w*)+", text)) - {"modhifi.json", "modhifi.log"}
    for name in names:
        pkgutil.resolve_name(name)
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - options - OTHER_OPTIONS


def test_the_page_of_choices_is_what_the_registries_hold() -> None:
    # In a process of its own: other tests register entries.
    code = "import choices; print(choices.page(), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "eval", capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs" / "choices.md").read_text(encoding="utf-8"), "run python eval/choices.py"
