"""What distillation brings back: the demo's ResNet and a ResNet-50 at a share of their FLOPs, SmolLM2-135M without a
fifth of its FFN.

    MODHIFI_DATA=DIR python eval/heal.py --part half|quarter|inverted|resnet50|resnet50-synthetic|smollm2|
        smollm2-global|unlearned|unlearned-resnet50|unlearned-half
        [--steps N] [--minutes M]

Every image part adds its row to results/heal.json and results/heal.md; the language model has a table of its own. A
part that was ended goes on where it was. Data and model of smollm2 are those of eval/lm_prune.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import HERE, RESULTS, cifar10, perplexity, reference, write_results
from lm_prune import WINDOW, cached, smollm2
from lm_texts import KINDS
from torch import Tensor, nn

import modhifi
from modhifi.data.in_memory import from_items
from modhifi.data.sources import load_samples
from modhifi.models.loaded import LoadedModel
from modhifi.unlearning.batchnorm import recall

WORK = HERE / "data" / "heal"
HELD, OWN, LM_BATCH = 8, 384, 4
# Windows that anyone has, by kind, and their share of the mass of a cut; the rest is the model's own writing.
ANYONE, ANYONES = {"WikiText-2": 256, "Python's reference": 256}, 0.1
# 30 steps brought code and Python's reference to 1.456 and 1.300 of the perplexity at 1e-4, to 1.441 and 1.342 at 3e-4.
LM_RATE = 2e-4
COLUMNS = [
    "model",
    "FLOPs kept",
    "learnt from",
    "original",
    "pruned",
    "healed",
    "agreement, pruned",
    "agreement, healed",
    "blocks matched",
    "steps",
    "core minutes",
]
INTRO = """# Healed by distillation, without labels
Pruned on 1,000 unlabelled training images (the inverted row: on the inverted images that it is healed on; ResNet-50: on
2,500 images with 8 rows a column), then distilled from the original (`modhifi heal`). Top-1 and agreement with the
original in % of all 5,000 CIFAR-10 test images. Core minutes are processor time of the whole, from pruning to the
report where that was done in one go, drawing of images included. *Blocks matched* are those whose outputs are learnt
beside the model's; the inverted row is of before narrower ones could be.
Command: `python eval/heal.py --part PART`."""
# Twice as fast on a CPU that has instructions for it.
HALF = {"precision": "bf16"}
DEMO, RESNET50 = "demo's ResNet", "ResNet-50"
PARTS: dict[str, dict[str, Any]] = {
    "half": {"model": DEMO, "flops": "0.5x", "data": "images", "samples": 10_000},
    "quarter": {"model": DEMO, "flops": "0.25x", "data": "images", "samples": 10_000},
    "inverted": {"model": DEMO, "flops": "0.5x", "data": "synthetic:invert", "samples": 500},
    "resnet50": {
        "model": RESNET50,
        "flops": "0.2457x",
        "data": "images",
        "samples": 5_000,
        "pruned on": 2_500,
        "cut": {"rows_per_column": 8},
        "method": HALF,
    },
    "resnet50-synthetic": {
        "model": RESNET50,
        "flops": "0.2457x",
        "data": "synthetic",
        "samples": 2_500,
        "pruned on": 2_500,
        "cut": {"rows_per_column": 8},
        "method": HALF,
    },
}


def run(part: str, steps: int) -> dict[str, Any]:
    """Prunes and heals; the row of the table."""
    setting, images = PARTS[part], cifar10()
    model = source_of(setting["model"])
    train, test = f"images:{images / 'train'}", f"images:{images / 'test'}"
    source = train if setting["data"] == "images" else setting["data"]
    small, out = WORK / f"{part}-pruned", WORK / f"{part}-healed"
    common = {"evaluate": test, "evaluation_samples": 5000, "checks": {"walked": 0}, "force": True, "progress": show}
    samples = setting.get("pruned on", min(1000, setting["samples"]))
    start = time.process_time()
    if not small.is_dir():
        more = {"samples": samples, "batch_size": 100, "method": setting.get("cut", {})}
        modhifi.prune(model, source, flops=setting["flops"], out=small, **more, **common)
    method = setting.get("method", {})
    result = modhifi.heal(
        small, source, samples=setting["samples"], steps=steps, method=method, out=out, **common
    ).report
    seconds = time.process_time() - start
    rows = {row["name"]: row for row in result["before_after"]}
    top, agreed, flops = rows["top-1 accuracy"], rows["agreement with the original"], rows["FLOPs per sample"]
    return {
        "model": setting["model"],
        "FLOPs kept": flops["after"] / flops["before"],
        "learnt from": result["data"]["learnt from"].replace(str(images), "cifar10"),
        **{name: 100 * top[key] for name, key in (("original", "before"), ("pruned", "between"), ("healed", "after"))},
        "agreement, pruned": 100 * agreed["between"],
        "agreement, healed": 100 * agreed["after"],
        "blocks matched": len(result["healing"]["matched blocks"]),
        "steps": result["healing"]["steps"],
        "core minutes": seconds / 60,
        "part": part,
        "healing": result["healing"],
        "settings": result["settings"],
    }


def own_writing(original: LoadedModel) -> tuple[list[Tensor], float]:
    """What the model writes itself, and the processor time that it takes, in seconds."""
    start = time.process_time()
    own = load_samples("self", original, n=OWN, window=WINDOW)
    return [own.load(i) for i in range(OWN)], time.process_time() - start


def language_model(part: str, steps: int, minutes: float) -> None:
    """Prunes a fifth of the neurons on the model's own writing and anyone's text, and distils the original on both."""
    layout = LAYOUTS[part]
    original = smollm2()
    small, out = WORK / f"{part}-pruned", WORK / f"{part}-healed"
    texts, held = {}, {}
    for kind, make in KINDS.items():
        if kind in ANYONE:
            texts[kind], held[kind] = make(original, ANYONE[kind] + HELD, WINDOW).split(ANYONE[kind], HELD)
        else:
            held[kind] = make(original, HELD, WINDOW)
    common: dict[str, Any] = {
        "evaluate": next(iter(held.values())),
        "evaluation_samples": HELD,
        "window": WINDOW,
        "force": True,
        "progress": show,
        "checks": {"walked": 0},
    }
    own, writing = cached(WORK / f"own-{OWN}.pt", partial(own_writing, original))
    if not small.is_dir():
        method = {"only": ["neurons"], "layout": layout}
        sources = [from_items(own, None, n=OWN, seed=0), *texts.values()]
        data = modhifi.Mixture(sources, [1 - ANYONES * len(texts), *[ANYONES] * len(texts)])
        modhifi.prune(original, data, ratio=0.2, samples=OWN, method=method, out=small, **common)
    start = time.process_time()
    items = [*own, *(text.load(i) for text in texts.values() for i in range(len(text)))]
    train = from_items(items, None, n=len(items), seed=0)
    result = modhifi.heal(
        small,
        train,
        against=original,
        samples=len(train),
        steps=steps,
        minutes=minutes,
        batch_size=LM_BATCH,
        method={"precision": "bf16", "learning_rate": LM_RATE},
        out=out,
        **common,
    )
    core_minutes = (time.process_time() - start) / 60
    models = {"original": original.model, "pruned": modhifi.load(small), "healed": result.model}
    values = {
        name: {kind: perplexity(partial(original.logits, model=model), text) for kind, text in held.items()}
        for name, model in models.items()
    }
    rows = []
    for name, figures in values.items():
        ratios = {kind: figures[kind] / values["original"][kind] for kind in held}
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        rows.append({"model": name, "worst": max(ratios.values()), "mean": mean, **ratios})
    learnt = result.report["healing"]["steps"]
    intro = f"""# SmolLM2-135M without 20 % of its FFN neurons, healed
Perplexity over the original's on up to {HELD} windows of {WINDOW} tokens of every kind of text (`eval/lm_texts.py`),
none of which was learnt from. Pruned on {OWN} windows of the model's own writing and on other documents of two of the
kinds, {" and ".join(f"{len(text)} windows of {kind}" for kind, text in texts.items())}, {ANYONES:.0%} of the mass
each, in `{layout}` layout, then distilled from the original on the same windows, for {learnt} steps of {LM_BATCH} of
them, in bfloat16: {core_minutes:.1f} core minutes and {writing / 60:.1f} for the writing.
Command: `python eval/heal.py --part {part} --minutes {minutes:g}`."""
    more = {"healing": result.report["healing"], "core minutes": core_minutes, "writing minutes": writing / 60}
    write_results(f"heal_{part.replace('-', '_')}", rows, ["model", "worst", "mean", *held], intro, **more)


UNLEARNED: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "unlearned": (DEMO, 2000, 5000, {}),
    "unlearned-resnet50": (RESNET50, 800, 800, HALF),
}
# The one that the demo's ResNet of the first is pruned to.
UNLEARNED_HALF = "unlearned-half"
# Of the language models.
LAYOUTS = {"smollm2": "uniform", "smollm2-global": "global"}
CAT = 3
KEYS = ("forget", "retain", "recall", "probe", "neighbours")


def unlearned(part: str, steps: int) -> None:
    """Forgets the class cat, heals on 5,000 images that are said to be of others, and attacks both."""
    (name, learnt, attacked, method), images = UNLEARNED[part], cifar10()
    model = source_of(name)
    train, test = f"images:{images / 'train'}", f"images:{images / 'test'}"
    directory, out = WORK / part, WORK / f"{part}-healed-{steps}"
    common = {"evaluate": test, "evaluation_samples": attacked, "checks": {"walked": 0}, "progress": show}
    if not directory.is_dir():
        modhifi.unlearn(model, train, forget="cat", samples=learnt, out=directory, **common)
    result = modhifi.heal(
        directory, train, samples=5000, steps=steps, method=method, out=out, force=True, **common
    ).report
    before = json.loads((directory / "report.json").read_text())["audit"]["rows"]
    after = result["audit"]["rows"]
    named = {"original": before["original"], "unlearned": before["edited"], f"healed, {steps} steps": after["edited"]}
    add_unlearned(
        name,
        {key: {k: 100 * row[k] for k in KEYS} for key, row in named.items()},
        {f"{part}, {steps} steps": result["healing"]},
    )


def unlearned_half(steps: int) -> None:
    """Prunes the demo's ResNet that forgot the class cat to half of its FLOPs, and heals it."""
    images, loaded = cifar10(), reference("demo")
    train, test = f"images:{images / 'train'}", f"images:{images / 'test'}"
    forgot, small, out = (WORK / name for name in ("unlearned", f"{UNLEARNED_HALF}-pruned", f"{UNLEARNED_HALF}-healed"))
    common = {"evaluate": test, "evaluation_samples": 5000, "checks": {"walked": 0}, "force": True, "progress": show}
    modhifi.prune(forgot, train, flops="0.5x", samples=1000, batch_size=100, out=small, **common)
    healing = modhifi.heal(small, train, samples=5000, steps=steps, out=out, **common).report["healing"]
    held, learnt = load_samples(test, loaded, n=5000), load_samples(train, loaded, n=2000)
    assert held.labels is not None and learnt.labels is not None
    cat = held.labels == CAT
    retained = learnt.subset(torch.nonzero(learnt.labels != CAT).flatten())

    def predicted(model: nn.Module) -> Tensor:
        return torch.cat([loaded.logits(batch, model).argmax(1) for batch in held.batches(250)])

    def row(model: nn.Module) -> dict[str, float]:
        again = recall(loaded, model, retained, 100)
        assert again is not None
        top, top_again = predicted(model), predicted(again)
        hits = {"forget": top[cat] == CAT, "retain": (top == held.labels)[~cat], "recall": top_again[cat] == CAT}
        return {key: 100 * float(hit.float().mean()) for key, hit in hits.items()}

    models = {"original": loaded.model, "unlearned": forgot, "unlearned, pruned": small, f"healed, {steps} steps": out}
    with torch.no_grad():
        rows = {key: row(modhifi.load(m) if isinstance(m, Path) else m) for key, m in models.items()}
    add_unlearned(f"{DEMO}, half of its FLOPs", rows, {UNLEARNED_HALF: healing})


def add_unlearned(network: str, rows: dict[str, dict[str, float]], healing: dict[str, Any]) -> None:
    """Writes the table with the rows of a network; those with the names of these are replaced."""
    file = RESULTS / "heal_unlearned.json"
    earlier = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    new = [{"network": network, "model": key, **row} for key, row in rows.items()]
    names = [(row["network"], row["model"]) for row in new]
    everything = [*(row for row in earlier["rows"] if (row["network"], row["model"]) not in names), *new]
    everything.sort(key=lambda row: (row["network"], "healed" in row["model"]))
    kept = {key: value for key, value in earlier.items() if key not in ("machine", "rows")}
    intro = """# Healed after a class was forgotten
The class cat of CIFAR-10, default method; healed on those of 5,000 unlabelled training images that the original
takes for other classes, from a teacher to which the class is closed. In %, on 5,000 test images, half of which the
attacks learn from (ResNet-50: 800); columns as in unlearn_resnet.md. The network of half the FLOPs was pruned on 1,000
images after it had forgotten, and shows all of the 5,000; no attack on its blocks can be compared with the original.
Command: `python eval/heal.py --part unlearned|unlearned-resnet50|unlearned-half --steps N`."""
    write_results("heal_unlearned", everything, ["network", "model", *KEYS], intro, **kept | healing)


def source_of(name: str) -> str:
    return "demo:resnet" if name == DEMO else str(Path(os.environ["MODHIFI_DATA"]) / "resnet50_cifar10")


def show(stage: str, done: int, total: int) -> None:
    if done % 20 == 0:
        print(f"{stage.strip()}: {done} of {total}", flush=True)


def add(row: dict[str, Any]) -> None:
    """Writes the table with the row in the place of an earlier one of its part and steps."""
    file = RESULTS / "heal.json"
    others = json.loads(file.read_text())["rows"] if file.is_file() else []
    others = [r for r in others if (r["part"], r["steps"]) != (row["part"], row["steps"])]
    rows = sorted([*others, row], key=lambda r: (list(PARTS).index(r["part"]), r["steps"]))
    write_results("heal", rows, COLUMNS, INTRO)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=[*PARTS, *LAYOUTS, *UNLEARNED, UNLEARNED_HALF], required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=15.0, help="of language models")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    WORK.mkdir(parents=True, exist_ok=True)
    # The time that drawing takes is part of the result.
    os.environ["MODHIFI_CACHE"] = str(WORK / "cache")
    if arguments.part in LAYOUTS:
        language_model(arguments.part, arguments.steps, arguments.minutes)
    elif arguments.part in UNLEARNED:
        unlearned(arguments.part, arguments.steps)
    elif arguments.part == UNLEARNED_HALF:
        unlearned_half(arguments.steps)
    else:
        add(run(arguments.part, arguments.steps))
