"""What distillation brings back: the demo's ResNet at a share of its FLOPs, SmolLM2-135M without a fifth of its FFN.

    MODHIFI_DATA=DIR python eval/heal.py --part half|inverted|quarter|smollm2 [--steps N] [--minutes M]

Every image part adds its row to results/heal.json and results/heal.md; the language model has a table of its own. A
part that was ended goes on where it was. Data and model of smollm2 are those of eval/lm_prune.py.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch
from common import HERE, RESULTS, cifar10, perplexity, write_results
from lm_prune import WINDOW, smollm2, wikitext
from lm_self import manual

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
images. Core minutes are processor time of the whole, from pruning to the report: drawing of images included.
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
    start = time.process_time()
    if not small.is_dir():
        modhifi.prune(
            "demo:resnet", source, flops=setting["flops"], samples=samples, batch_size=100, out=small, **common
        )
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


def language_model(steps: int, minutes: float) -> None:
    """Prunes a fifth of the neurons on articles of WikiText-2, and distils the original into the rest on some more."""
    original = smollm2()
    train, held = wikitext(original, 128)
    _, other = manual(original, 1)
    small, out = WORK / "smollm2-pruned", WORK / "smollm2-healed"
    common: dict[str, Any] = {"evaluate": held, "evaluation_samples": len(held), "window": WINDOW, "force": True}
    method = {"only": ["neurons"], "layout": "uniform"}
    if not small.is_dir():
        modhifi.prune(original, train.subset(range(64)), ratio=0.2, samples=64, method=method, out=small, **common)
    start, wall = time.process_time(), time.perf_counter()
    result = modhifi.heal(
        small,
        train,
        against=original,
        samples=len(train),
        steps=steps,
        minutes=minutes,
        batch_size=4,
        out=out,
        progress=show,
        **common,
    )
    core_minutes, wall_minutes = (time.process_time() - start) / 60, (time.perf_counter() - wall) / 60
    models = {"original": original.model, "pruned": modhifi.load(small), "healed": result.model}
    texts = {"WikiText-2, other articles": held, "Python's reference": other}
    values = {
        name: {text: perplexity(lambda b, m=model: original.logits(b, m), samples) for text, samples in texts.items()}
        for name, model in models.items()
    }
    rows = [
        {
            "model": name,
            **figures,
            **{f"{text}, over dense": figures[text] / values["original"][text] for text in texts},
        }
        for name, figures in values.items()
    ]
    columns = ["model", *(column for text in texts for column in (text, f"{text}, over dense"))]
    intro = f"""# SmolLM2-135M without 20 % of its FFN neurons, healed
Perplexities. Pruned on 64 windows of 512 tokens of WikiText-2, then distilled from the original on {len(train)} for
{result.report["healing"]["steps"]} steps of 4 windows ({core_minutes:.1f} core minutes, {wall_minutes:.1f} minutes).
Command: `python eval/heal.py --part smollm2`."""
    more = {"healing": result.report["healing"], "core minutes": core_minutes, "minutes": wall_minutes}
    write_results("heal_smollm2", rows, columns, intro, **more)


def show(stage: str, done: int, total: int) -> None:
    if done % 20 == 0:
        print(f"{stage.strip()}: {done} of {total}", flush=True)


def add(row: dict[str, Any]) -> None:
    """Writes the table with the row in the place of an earlier one of its part."""
    file = RESULTS / "heal.json"
    others = [r for r in json.loads(file.read_text())["rows"] if r["part"] != row["part"]] if file.is_file() else []
    rows = sorted([*others, row], key=lambda r: list(PARTS).index(r["part"]))
    write_results("heal", rows, COLUMNS, INTRO)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=[*PARTS, "smollm2"], required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=15.0, help="of smollm2")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    WORK.mkdir(parents=True, exist_ok=True)
    # The time that drawing takes is part of the result.
    os.environ["MODHIFI_CACHE"] = str(WORK / "cache")
    if arguments.part == "smollm2":
        language_model(arguments.steps, arguments.minutes)
    else:
        add(run(arguments.part, arguments.steps))
