"""The ladder of bounds for pruning the demo's ResNet at 10, 25 and 50 %.

    MODHIFI_DATA=DIR python eval/bounds.py

Calibrates on 200 of the demo's unlabelled images, bounds on 1,000 CIFAR-10 test images (upscaled by the model's own
preprocessing). Writes eval/results/bounds.{md,json}.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import Any

import torch
from common import DEMO_MODEL, cifar10, reference, write_results
from torch import nn

from modhifi.allocate import Budget
from modhifi.data import Samples, load_samples
from modhifi.ladder_affine import Norms
from modhifi.ladder_certified import certify
from modhifi.load import LoadedModel
from modhifi.pruning import Pruned, PruneSettings, prune_model
from modhifi.verify import BoundReport, verify_model

RATIOS = (0.1, 0.25, 0.5)
COLUMNS = [
    "removed", "flips", "flips at most (R3)", "R4 measured", "R2", "R1 theorem", "R1 every input", "constant predictor",
    "R1 / R2", "R1 informative from", "R2 informative from", "seconds",
]  # fmt: skip


def main(units: int, walked: int) -> None:
    loaded = reference("resnet")
    calibration = load_samples(f"images:{DEMO_MODEL.parent / 'images' / 'calibration'}", loaded, n=200)
    held = load_samples(f"images:{cifar10() / 'test'}", loaded, n=units)
    rows, layers = [], {}
    for ratio in RATIOS:
        pruned = prune_model(loaded, calibration, Budget("components", 1 - ratio), PruneSettings())
        start = time.perf_counter()
        report = verify_model(loaded, pruned.model, pruned.dense_shape, held, walked=walked)
        seconds = time.perf_counter() - start
        rows.append(row(ratio, report, seconds) | depths(loaded, pruned, held, report, min(4, walked)))
        layers[f"{ratio:.0%}"] = report.to_json()["bounds"]["layers"]
        print(rows[-1], flush=True)
    intro = (
        "Pruning the demo's ResNet-18 by share of components. Changes of the output are Euclidean; R1, R2 and R4 are "
        f"root mean squares over {walked} images, R3 is one-sided at 95 % over {units} images. A bound is informative "
        "below the error of a predictor of the mean output; `informative from` is the first modified layer such that "
        "the edits from there to the head alone have such a bound. Seconds are wall time of the whole ladder."
    )
    write_results("bounds", rows, COLUMNS, intro, layers=layers)


def row(ratio: float, report: BoundReport, seconds: float) -> dict[str, Any]:
    rungs = {r.name: r.value for r in report.rungs}
    flips = report.statistical.flips
    local, theorem = rungs["R2 certified-local"], rungs["R1 theorem form"]
    assert local is not None and theorem is not None
    return {
        "removed": f"{ratio:.0%}",
        "flips": flips.measured,
        "flips at most (R3)": flips.upper,
        "R4 measured": rungs["R4 measured"],
        "R2": local,
        "R1 theorem": theorem,
        "R1 every input": rungs["R1 every input"],
        "R1 / R2": theorem / local,
        "constant predictor": report.constant_error,
        "self-test": report.verdicts[0].verdict,
        "seconds": seconds,
    }


def depths(loaded: LoadedModel, pruned: Pruned, held: Samples, report: BoundReport, walked: int) -> dict[str, Any]:
    """How deep an edit may begin and still have an informative bound, for R1 and R2; edits before it are undone."""
    dense = copy.deepcopy(loaded.model).cpu().double()
    edited = copy.deepcopy(pruned.dense_shape).cpu().double()
    batch = torch.stack([held.load(i) for i in range(walked)]).double()
    norms = Norms()
    whole = certify(loaded, dense, edited, batch, norms)
    found: dict[str, Any] = {"by depth": []}
    for start in range(len(whole.layers)):
        undo(edited, dense, [n for _, names, _, _ in whole.layers[:start] for n in names])
        part = certify(loaded, dense, edited, batch, norms)
        local = float(part.local.square().mean().sqrt())
        figures = {"from": whole.layers[start][0], "R1": part.expected, "R2": local, "ratio": part.expected / local}
        found["by depth"].append(figures)
    for rung in ("R1", "R2"):
        good = [d["from"] for d in found["by depth"] if d[rung] < report.constant_error]
        found[f"{rung} informative from"] = good[0] if good else "nowhere"
    assert all(math.isfinite(d["R1"]) for d in found["by depth"])
    return found


def undo(edited: nn.Module, dense: nn.Module, names: list[str]) -> None:
    original = dense.state_dict()
    for name, value in edited.state_dict().items():
        if name in names:
            value.copy_(original[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--walked", type=int, default=16)
    arguments = parser.parse_args()
    main(arguments.units, arguments.walked)
