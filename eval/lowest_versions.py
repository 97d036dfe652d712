"""Do the tests pass with the lowest version of every dependency that `pyproject.toml` admits?

    python eval/lowest_versions.py [TESTS ...] [--keep PACKAGE ...]  # writes eval/results/lowest_versions.{md,json}

uv (`pip install uv`) resolves with `lowest-direct`; the versions are installed beside this environment's own and put
in front of them. PyTorch, torchvision and what comes with them are this environment's: they take gigabytes. `--keep`
leaves more packages as they are here, which tells which one a failure comes from.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/runs/test_check.py",
    "tests/models/test_load.py",
    "tests/cli/test_main.py",
)
HEAVY = ("torch", "torchvision", "triton", "nvidia-", "cuda-")
LINE = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)", re.MULTILINE)


def resolve(keep: list[str]) -> dict[str, str]:
    """The lowest versions that go together, by name, without those that stay as they are in this environment."""
    if shutil.which("uv") is None:
        sys.exit("uv is not installed: pip install uv")
    kept = "".join(f"{name}=={version(name)}\n" for name in keep)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(kept)
        constraints.flush()
        command = ["uv", "pip", "compile", "pyproject.toml", "--resolution", "lowest-direct", "-q", "--no-header"]
        command += ["--python", sys.executable, "--no-annotate", "--constraints", constraints.name]
        text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    left = (*HEAVY, *keep)
    return {name: number for name, number in LINE.findall(text) if not name.startswith(left)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", default=TESTS)
    parser.add_argument("--keep", nargs="*", default=[], metavar="PACKAGE")
    options = parser.parse_args()
    versions = resolve(options.keep)
    with tempfile.TemporaryDirectory() as place:
        wanted = [f"{name}=={number}" for name, number in versions.items()]
        subprocess.run(["uv", "pip", "install", "-q", "--no-deps", "--target", place, *wanted], check=True)
        environment = os.environ | {"PYTHONPATH": place, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *options.tests]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-4000:])
    outcome = done.stdout.strip().splitlines()[-1]
    direct = re.findall(r'^    "([A-Za-z_0-9]+)>=', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    rows = {name: number for name, number in versions.items() if name.replace("-", "_") in {*direct, "tokenizers"}}
    result = {"torch": version("torch"), "lowest": rows, "kept": options.keep, "tests": [*options.tests]}
    result |= {"outcome": outcome, "passed": done.returncode == 0}
    results = ROOT / "eval/results"
    (results / "lowest_versions.json").write_text(json.dumps(result, indent=2) + "\n")
    table = "\n".join(f"| {name} | {number} |" for name, number in rows.items())
    (results / "lowest_versions.md").write_text(
        f"# Lowest versions of dependencies\n\n`python eval/lowest_versions.py` ran {', '.join(options.tests)} with "
        f"torch {version('torch')}: {outcome}.\n\n| package | version |\n|---|---|\n{table}\n"
    )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
