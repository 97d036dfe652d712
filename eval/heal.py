"""What distillation brings back: the demo's ResNet cut to a share of its FLOPs, healed without a label.

    MODHIFI_DATA=DIR python eval/heal.py --part half|inverted|quarter [--steps N]

Every part adds its row to results/heal.json and results/heal.md. A part that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from common import HERE, RESULTS, cifar10, write_results  # type: ignore[import-not-found]

import modhifi

WORK = HERE / "data" / "heal"
COLUMNS = [
    "model",
    "FLOPs kept",
    "learnt from",
    "original",
    "pruned",
    "healed",
    "agreement, pruned",
    "agreement, healed",
    "steps",
    "core minutes",
]
INTRO = """# Healed by distillation, without labels
Pruned on 1,000 unlabelled training images (the inverted row: on the inverted images that it is healed on), then
distilled from the original (`modhifi heal`). Top-1 and agreement with the original in % of all 5,000 CIFAR-10 test
images. Core minutes are processor time of the whole healing run, drawing of images and measuring included.
Command: `python eval/heal.py --part PART`."""
PARTS: dict[str, dict[str, Any]] = {
    "half": {"flops": "0.5x", "data": "images", "samples": 10_000},
    "quarter": {"flops": "0.25x", "data": "images", "samples": 10_000},
    "inverted": {"flops": "0.5x", "data": "synthetic:invert", "samples": 500},
}


def run(part: str, steps: int) -> dict[str, Any]:
    """Prunes and heals; the row of the table."""
    setting, images = PARTS[part], cifar10()
    train, test = f"images:{images / 'train'}", f"images:{images / 'test'}"
    source = train if setting["data"] == "images" else setting["data"]
    small, out = WORK / f"{part}-pruned", WORK / f"{part}-healed"
    common = {"evaluate": test, "evaluation_samples": 5000, "checks": {"walked": 0}, "force": True}
    samples = min(1000, setting["samples"])
    if not small.is_dir():
        modhifi.prune(
            "demo:resnet", source, flops=setting["flops"], samples=samples, batch_size=100, out=small, **common
        )
    start = time.process_time()
    result = modhifi.heal(
        small, source, samples=setting["samples"], steps=steps, out=out, progress=show, **common
    ).report
    seconds = time.process_time() - start
    rows = {row["name"]: row for row in result["before_after"]}
    top, agreed, flops = rows["top-1 accuracy"], rows["agreement with the original"], rows["FLOPs per sample"]
    return {
        "model": "demo's ResNet",
        "FLOPs kept": flops["after"] / flops["before"],
        "learnt from": result["data"]["learnt from"].replace(str(images), "cifar10"),
        **{name: 100 * top[key] for name, key in (("original", "before"), ("pruned", "between"), ("healed", "after"))},
        "agreement, pruned": 100 * agreed["between"],
        "agreement, healed": 100 * agreed["after"],
        "steps": result["healing"]["steps"],
        "core minutes": seconds / 60,
        "part": part,
        "healing": result["healing"],
        "settings": result["settings"],
    }


def show(stage: str, done: int, total: int) -> None:
    if done % 20 == 0:
        print(f"{stage.strip()}: {done} of {total}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    WORK.mkdir(parents=True, exist_ok=True)
    # The time that drawing takes is part of the result.
    os.environ["MODHIFI_CACHE"] = str(WORK / "cache")
    row = run(arguments.part, arguments.steps)
    file = Path(RESULTS / "heal.json")
    others = [r for r in json.loads(file.read_text())["rows"] if r["part"] != row["part"]] if file.is_file() else []
    rows = sorted([*others, row], key=lambda r: list(PARTS).index(r["part"]))
    write_results("heal", rows, COLUMNS, INTRO)
