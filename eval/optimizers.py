"""Which optimiser distils best: the demo's ResNet at half its FLOPs, a ResNet-50 at a quarter, same steps, same images.

    MODHIFI_DATA=DIR python eval/optimizers.py [--model demo|resnet50] [--steps N] [--only NAME ...]

DIR holds cifar10.tar.gz, and for the last resnet50_cifar10. Rows that the results file has are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch
from common import RESULTS, cifar10, write_results
from heal import DEMO, RESNET50, WORK, source_of

import modhifi
from modhifi.data.sources import load_samples
from modhifi.healing.distil import distil
from modhifi.healing.optimizers import OPTIMIZERS
from modhifi.healing.settings import HealSettings
from modhifi.runs.heal_inputs import load_patient
from modhifi.runs.inputs import NOTHING
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.steady_memory import steady_memory

# By model its name, the FLOPs that it keeps, and the steps.
MODELS = {"demo": (DEMO, "0.5x", 200), "resnet50": (RESNET50, "0.2457x", 64)}
LEARNT, CHOSEN, BATCH, TEMPERATURE = 4000, 1000, 128, 4.0
# By name the optimiser, its learning rate (None is its default), and whether BatchNorm follows the images.
WAYS: dict[str, tuple[str, float | None, bool]] = {
    "sgd, BatchNorm follows": ("sgd", None, True),
    "sgd": ("sgd", None, False),
    "sgd, 0.006": ("sgd", 0.006, False),
    "adamw": ("adamw", None, False),
    "muon, BatchNorm follows": ("muon", None, True),
    "muon": ("muon", None, False),
    "muon, 0.001": ("muon", 0.001, False),
    "muon, 0.002": ("muon", 0.002, False),
    "muon, 0.01": ("muon", 0.01, False),
}
COLUMNS = ["way", "learning rate", "divergence, pruned", "divergence, healed", "agreement, healed", "core s a step"]


@steady_memory()
def main(options: argparse.Namespace) -> None:
    name, flops, usual = MODELS[options.model]
    steps = options.steps or usual
    images = f"images:{cifar10() / 'train'}"
    small = WORK / f"optimizers-{options.model}"
    if not small.is_dir():
        common: dict[str, Any] = {"samples": 1000, "checks": {"walked": 0}, "evaluation_samples": 100}
        modhifi.prune(source_of(name), images, flops=flops, out=small, **common)
    patient = load_patient(HealRecipe(directory=str(small)), NOTHING)
    # What calibrated the cut comes first.
    everything = load_samples(images, patient.original, n=LEARNT + CHOSEN)
    train, validation = everything.split(LEARNT, CHOSEN)
    path, settings = RESULTS / f"optimizers_{options.model}.json", {"steps": steps}
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[dict[str, Any]] = earlier["rows"] if earlier.get("settings") == settings else []
    for way in options.only or WAYS:
        if any(row["way"] == way for row in rows):
            continue
        optimizer, rate, follows = WAYS[way]
        chosen = HealSettings(
            learning_rate=rate or OPTIMIZERS[optimizer].rate,
            batch_size=BATCH,
            optimizer=optimizer,
            steps=steps,
            temperature=TEMPERATURE,
            augment=True,
            batch_statistics=follows,
            precision="bf16" if options.model == "resnet50" else "no",
        )
        start = time.process_time()
        healed = distil(patient.original, patient.edited.model, train, validation, chosen, cut=patient.cut)
        seconds = time.process_time() - start
        first, last = healed.curve[0], healed.curve[-1]
        rows.append(
            {
                "way": way,
                "learning rate": chosen.learning_rate,
                "divergence, pruned": first["divergence"],
                "divergence, healed": last["divergence"],
                "agreement, healed": 100 * last["agreement"],
                "core s a step": seconds / steps,
                "notes": healed.notes,
            }
        )
        print(rows[-1], flush=True)
        rows.sort(key=lambda row: list(WAYS).index(row["way"]))
        write_results(
            f"optimizers_{options.model}",
            rows,
            COLUMNS,
            f"""# Optimisers of a distillation
The {name}, pruned on 1,000 unlabelled training images, after {steps} steps of {BATCH} of {LEARNT} images: divergence
from the original in nats and agreement with it in %, both on {CHOSEN} other images. Time has the looks at them in it.
Command: `python eval/optimizers.py --model {options.model}`.""",
            settings=settings,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", nargs="+", choices=WAYS)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    WORK.mkdir(parents=True, exist_ok=True)
    main(parser.parse_args())
