"""How long the stages of the demo take in two versions of modhifi, in turns on one machine.

python eval/stages.py before=/old/.venv/bin/python after=.venv/bin/python [--rounds 3]

Each version is NAME=PYTHON[,PYTHONPATH]. Every round runs the demo once with each, each time the other one first.
Writes eval/results/stages.json and stages.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common import write_results

# What checks a pruned model, and so what a user waits for behind the pruning itself.
CHECKS = ("measure", "bound", "reload")
# Runs in the other version's process: notes the wall clock and the CPU time, children's included, of every stage.
CHILD = """
import contextlib, importlib, importlib.util, json, os, sys, time
place = "modhifi.clock" if importlib.util.find_spec("modhifi.clock") else "modhifi.progress"
Clock = importlib.import_module(place).Clock
plain, stages = Clock.stage, {}
@contextlib.contextmanager
def timed(self, name):
    marks = os.times()
    with plain(self, name):
        yield
    now = os.times()
    user = now.user + now.children_user - marks.user - marks.children_user
    stages[name] = {"wall": now.elapsed - marks.elapsed, "user": user}
Clock.stage = timed
out, file = sys.argv[1:]
sys.argv = ["modhifi", "demo", "--out", out, "--quiet"]
from modhifi.cli.main import main
try:
    main()
except SystemExit as end:
    if end.code:
        raise
json.dump(stages, open(file, "w"))
"""

INTRO = """Seconds of each stage of `modhifi demo` in two versions: medians of {rounds} rounds that took turns on one
machine shared with other work, run as a user runs it. *user* is CPU time in user mode, child processes that have ended
included, *wall* the clock. Made by `eval/stages.py`."""


def run_demo(python: str, path: str) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stages.json"
        environment = os.environ | {"PYTHONPATH": path, "MODHIFI_CACHE": f"{folder}/cache"}
        command = [python, "-c", CHILD, f"{folder}/demo", str(file)]
        subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        stages: dict[str, dict[str, float]] = json.loads(file.read_text())
    checks = {unit: sum(stages[name][unit] for name in CHECKS) for unit in ("wall", "user")}
    return {**stages, " + ".join(CHECKS): checks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs=2, metavar="NAME=PYTHON[,PYTHONPATH]")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    versions = {}
    for version in arguments.versions:
        name, _, place = version.partition("=")
        python, _, path = place.partition(",")
        versions[name] = (os.path.abspath(python), path)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in versions}
    for number in range(arguments.rounds):
        for name in list(versions)[:: 1 if number % 2 == 0 else -1]:
            runs[name].append(run_demo(*versions[name]))
            print(
                number, name, {k: {u: round(s, 2) for u, s in v.items()} for k, v in runs[name][-1].items()}, flush=True
            )
    first, second = versions
    rows: list[dict[str, Any]] = []
    for stage in runs[first][0]:
        row: dict[str, Any] = {"stage": stage}
        for unit in ("user", "wall"):
            values = {name: [run[stage][unit] for run in runs[name]] for name in versions}
            for name in versions:
                row[f"{unit}, {name}"] = statistics.median(values[name])
            pairs = zip(values[first], values[second], strict=True)
            row[f"{unit}, ratio"] = statistics.median(two / max(one, 1e-3) for one, two in pairs)
        rows.append(row)
    columns = ["stage", *(f"{unit}, {part}" for unit in ("user", "wall") for part in (first, second, "ratio"))]
    intro = INTRO.format(rounds=arguments.rounds)
    write_results("stages", rows, columns, intro, runs=runs)


if __name__ == "__main__":
    main()
