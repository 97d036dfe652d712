"""The figures of `modhifi demo`, as the README quotes them.

python eval/demo.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

from common import write_results

with tempfile.TemporaryDirectory() as place:
    command = [sys.executable, "-m", "modhifi", "demo", "--out", f"{place}/demo", "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

write_results(
    "demo",
    report["before_after"],
    ["name", "before", "after", "unit"],
    f"""# `modhifi demo`
A CIFAR-10 ResNet pruned to half its FLOPs with 500 unlabelled images, measured on 500 test images.
Seconds in all: {sum(report["timing"].values()):.0f}, of which pruning {report["timing"]["prune"]:.0f}.
Command: `python eval/demo.py`.""",
    timing=report["timing"],
    errors=report["errors"],
    outcome=report["outcome"],
)
