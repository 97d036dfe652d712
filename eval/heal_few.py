"""Few real images for a heal: alone, and with drawn ones beside them, which is the default.

    MODHIFI_DATA=DIR python eval/heal_few.py [--model demo|swin|efficientnet] [--images 0 50 200 800]

DIR holds cifar10.tar.gz, and for the last imagenet_sample.tar. Rows that the results file has are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, cifar10, efficientnet_lite0, imagenet_sample, reference, write_results
from heal import WORK
from torch import nn
from torch.nn import functional as F

import modhifi
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.loaded import LoadedModel


@dataclass(frozen=True)
class Case:
    """A network, the FLOPs that it keeps, how long and on how many images at once it is healed."""

    name: str
    flops: str
    steps: int
    batch: int


CASES = {
    "demo": Case("demo's ResNet", "0.5x", 800, 128),
    "swin": Case("Swin, CIFAR-10", "0.7x", 400, 128),
    "efficientnet": Case("EfficientNet-Lite0, ImageNet", "0.8x", 300, 32),
}
TEST, BATCH = 5000, 100
PRUNED, ALONE, BESIDE = "pruned", "these alone", "these and drawn ones"
COLUMNS = ["model", "real images", "learnt from", "top-1", "agreement", "divergence", "core minutes"]
INTRO = f"""# Few real images for a heal
Pruned on the same real images (none: on 1,000 drawn ones), then distilled from the original (`modhifi heal`). To
fewer than 1,000 real images 2,000 drawn ones are added by default, half of the mass each; `--only-this-data` leaves
them out. FLOPs kept, steps and batches:
{", ".join(f"{c.name} {c.flops}, {c.steps} of {c.batch}" for c in CASES.values())}. Top-1 and agreement with the
original in %, divergence from it in nats, on {TEST:,} test images of CIFAR-10, on 100 of ImageNet. One seed.
Command: `python eval/heal_few.py --model MODEL`."""


def load(model: str, real: int) -> tuple[LoadedModel, Samples | None, Samples]:
    """The network, so many images to learn from (None for none), and test images."""
    if model == "efficientnet":
        loaded = efficientnet_lite0()
        images = load_samples(f"images:{imagenet_sample()}", loaded, n=500)
        return loaded, images.subset(range(real)) if real else None, images.subset(range(400, 500))
    loaded, root = reference(model), cifar10()
    train = load_samples(f"images:{root / 'train'}", loaded, n=real) if real else None
    return loaded, train, load_samples(f"images:{root / 'test'}", loaded, n=TEST)


@torch.no_grad()
def figures(loaded: LoadedModel, model: nn.Module, test: Samples) -> dict[str, float]:
    """Top-1 and agreement with the original in %, and the mean divergence from it in nats."""
    assert test.labels is not None
    both = [[loaded.logits(batch, m).log_softmax(1) for m in (model, loaded.model)] for batch in test.batches(BATCH)]
    ours, theirs = map(torch.cat, zip(*both, strict=True))
    top = ours.argmax(1)
    return {
        "top-1": 100 * float((top == test.labels).float().mean()),
        "agreement": 100 * float((top == theirs.argmax(1)).float().mean()),
        "divergence": float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean")),
    }


def main(options: argparse.Namespace) -> None:
    case, path = CASES[options.model], RESULTS / "heal_few.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def known(**key: Any) -> bool:
        return any(key.items() <= row.items() for row in rows)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        order = [PRUNED, ALONE, BESIDE]
        names = [each.name for each in CASES.values()]
        rows.sort(key=lambda r: (names.index(r["model"]), r["real images"], order.index(r["learnt from"])))
        write_results("heal_few", rows, COLUMNS, INTRO)

    for real in options.images:
        loaded, train, test = load(options.model, real)
        data, source = train or "synthetic", Path(loaded.source)
        small = WORK / f"few-{options.model}-{real}-pruned"
        common: dict[str, Any] = {"evaluate": test.subset(range(100)), "checks": {"walked": 0}, "force": True}
        key = {"model": case.name, "real images": real}
        if not small.is_dir():
            modhifi.prune(source, data, flops=case.flops, samples=real or 1000, out=small, **common)
        if not known(**key, **{"learnt from": PRUNED}):
            dense = {"dense": figures(loaded, loaded.model, test)["top-1"]}
            add({**key, "learnt from": PRUNED, **figures(loaded, modhifi.load(small), test), **dense})
        for way in (ALONE, BESIDE) if real else (BESIDE,):
            if known(**key, **{"learnt from": way}):
                continue
            amounts = {"samples": real or 2000, "steps": case.steps, "batch_size": case.batch}
            start = time.process_time()
            healed = modhifi.heal(small, data, **amounts, only_this_data=way == ALONE, **common)
            minutes = (time.process_time() - start) / 60
            assert healed.model is not None
            found = figures(loaded, healed.model, test)
            add({**key, "learnt from": way, **found, "core minutes": minutes, "healing": healed.report["healing"]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CASES, default="demo")
    parser.add_argument("--images", type=int, nargs="+", default=[0, 50, 200, 800])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    WORK.mkdir(parents=True, exist_ok=True)
    main(parser.parse_args())
