"""Accuracy at the same memory of a pass, for plans by memory, by parameters and by FLOPs, on the demo's ResNet.

    MODHIFI_DATA=DIR python eval/memory.py

DIR holds cifar10.tar.gz. What is counted does not depend on the machine.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from common import Missing, accuracy, cifar10, reference, write_results
from latency import cached, kept, planner, widths_of

from modhifi.data.sources import load_samples
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.metered import meet
from modhifi.pruning.sensitivity import TRIAL, probed_plan
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, measure_moments
from modhifi.runs.timing.footprints import MemoryMeter
from modhifi.structure.sizes import sizes_of

BATCHES, SHARES = (1, 32), (0.7, 0.5)
CALIBRATION, TEST = 1000, 2000
COLUMNS = ["batch", "asked", "plan", "memory", "FLOPs", "parameters", "top-1"]
INTRO = f"""# Accuracy at the same memory of a pass: the demo's ResNet
Memory is that of the weights and of the most that the results of an eager pass hold at once, counted, over the dense
model's. Every plan is corrected, at most three times, until it is within 5 % of what was asked for. {CALIBRATION}
unlabelled training images, {TEST} test images, no training, `obs` and least squares in one shot, exact widths. Dense:
{{dense:.2f}} %.
Command: `python eval/memory.py`."""


def main() -> None:
    loaded, root, settings = reference("demo"), cifar10(), PruneSettings()
    calibration = cached(load_samples(f"images:{root / 'train'}", loaded, n=CALIBRATION))
    held = cached(load_samples(f"images:{root / 'test'}", loaded, n=TEST))
    structure = choose_groups(find_structure(loaded), settings)
    sizes = sizes_of(loaded.model, structure)
    moments = measure_moments(loaded, structure, calibration, settings.sampling)
    curves = removal_curves(loaded.model, structure, moments, settings, trial=TRIAL)
    half = Budget("macs", 0.5)
    weights = probed_plan(loaded, structure, curves, moments, calibration, half, settings).weights
    assert weights is not None
    intro, rows = INTRO.format(dense=accuracy(loaded.logits, held, 100)), []
    for batch in BATCHES:
        meter = MemoryMeter(batch)
        memory = Budget("memory", 0.5).gauged(meter.gauge(loaded, structure, settings.rounding))
        for share in SHARES:
            for kind, budget in (("memory", memory), ("parameters", Budget("parameters", 0.5)), ("FLOPs", half)):
                plan_at = planner(loaded, structure, curves, weights, budget, settings)
                plan, taken, _ = meet(
                    plan_at, partial(kept, budget, sizes), partial(meter.ratio, loaded, structure), share
                )
                model, widths = apply_plan(loaded, structure, plan, moments, settings).model, widths_of(plan)
                row: dict[str, Any] = {"batch": batch, "asked": share, "plan": f"by {kind}", "memory": taken.measured}
                row |= {
                    "FLOPs": sizes.macs(widths) / sizes.macs({}),
                    "parameters": sizes.parameters(widths) / sizes.parameters({}),
                    "top-1": accuracy(lambda b, m=model: loaded.logits(b, m), held, 100),
                }
                rows.append(row)
                print(row, flush=True)
                write_results("memory", rows, COLUMNS, intro)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except Missing as missing:
        print(f"not run: {missing}")
