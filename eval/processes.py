"""One process and several, which share the calibration passes: the same plan and weights, on real models.

MODHIFI_DATA=DIR python eval/processes.py [--processes 4] [--part smollm2|resnet50]

DIR holds wikitext2-valid.txt, resnet50_cifar10 (a directory of timm) and cifar10.tar.gz. Rows of other parts that
eval/results/processes.json has are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, cifar10, write_results
from lm_prune import SETTINGS, smollm2
from lm_prune import wikitext as windows
from sequential import resnet50

from modhifi.calibration.distributed import processes
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import contribute, prune_model
from modhifi.pruning.settings import PruneSettings

INTRO = """# One process and several
The same prune by one process and by {count} gloo processes on one machine, which share the calibration passes: SmolLM2
block by block, with 20 % of the FFN's neurons removed, and reader after reader; ResNet-50 reader after reader, at
half the MACs. *components that differ* are those kept by one plan alone, *weights* the largest relative difference
of a tensor, by its Frobenius norm. Command: `python eval/processes.py --processes {count}`."""

Task = tuple[LoadedModel, Samples, Budget, PruneSettings]


def text(samples: int, **changes: Any) -> Task:
    loaded = smollm2()
    settings = replace(SETTINGS, batch_size=1, **changes)
    return loaded, windows(loaded, samples)[0], Budget("components", 0.8), settings


def images() -> Task:
    loaded = resnet50()
    settings = PruneSettings(weighting="energy", sequential="dense", batch_size=4)
    return loaded, load_samples(f"images:{cifar10() / 'train'}", loaded, n=32), Budget("macs", 0.5), settings


PARTS: dict[str, dict[str, Callable[[], Task]]] = {
    "smollm2": {"blocks": lambda: text(8), "readers": lambda: text(4, sequential="dense")},
    "resnet50": {"readers": images},
}


def work(part: str, way: str, file: Path) -> None:
    """What one process does; the main one writes plan and weights."""
    torch.set_num_threads(1)
    team, (loaded, samples, budget, settings) = processes(), PARTS[part][way]()
    if team.main:
        pruned = prune_model(loaded, samples, budget, settings, team=team)
        torch.save((len(samples), pruned.plan.kept, pruned.model.state_dict()), file)
    else:
        contribute(loaded, samples, settings, None, team)


def compared(part: str, way: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        files = {1: Path(folder) / "1.pt", count: Path(folder) / f"{count}.pt"}
        for n, file in files.items():
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
            worker = [__file__, "--part", part, "--way", way, "--file", str(file)]
            subprocess.run([sys.executable, *launcher, *worker], check=True)
        (samples, kept, weights), (_, others, theirs) = (torch.load(file) for file in files.values())
    differ = sum(len(set(own) ^ set(others[name])) for name, own in kept.items())
    same = {name: own.double() for name, own in weights.items() if own.shape == theirs[name].shape}
    gaps = [float((theirs[name] - own).norm() / own.norm().clamp(min=1e-30)) for name, own in same.items()]
    return {
        "model": part,
        "passes": way,
        "samples": samples,
        "processes": count,
        "components kept": sum(map(len, kept.values())),
        "components that differ": differ,
        "weights": max(gaps),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        work(options.part, options.way, options.file)
        sys.exit()
    parts, stored = [options.part] if options.part else list(PARTS), RESULTS / "processes.json"
    rows = json.loads(stored.read_text())["rows"] if stored.is_file() else []
    rows = [row for row in rows if row["model"] not in parts]
    for part in parts:
        rows += [compared(part, way, options.processes) for way in PARTS[part]]
        write_results("processes", rows, list(rows[0]), INTRO.format(count=options.processes))
