"""What can follow a cut: pruned, healed, quantised and both, with the size and the time of each.

    MODHIFI_DATA=DIR python eval/after_pruning.py [--part demo|smollm2] [--minutes M]

Healed models are those that eval/heal.py has left in eval/data/heal; where there is none, one is healed here for a few
minutes. The demo runs in ONNX Runtime, SmolLM2 in llama.cpp (its converter on the PATH, the package xllamacpp), each on
one thread. Data and model of smollm2 as for eval/lm_prune.py.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import HERE, accuracy, write_results
from hand_overs import LlamaCpp, megabytes, onnx_int8, onnx_runtime, to_gguf
from lm_prune import smollm2
from lm_texts import KINDS
from torch import Tensor

import modhifi
from modhifi.artifacts.export import export
from modhifi.data.sources import load_samples

HEALED = HERE / "data" / "heal"
WORK = HERE / "data" / "after"
ROUNDS, RUNS, IMAGES, BATCH = 7, 20, 500, 100
TOKENS, WINDOWS, PROMPT, WRITTEN, TURNS = 128, 2, 128, 32, 3
# Kinds of text that no model has to write first.
TEXTS = list(KINDS)[:3]
Row = dict[str, Any]


def models(part: str, minutes: float, prune: dict[str, Any], heal: dict[str, Any]) -> dict[str, Path]:
    """The directories of the pruned and the healed model, made where eval/heal.py has left none."""
    name = {"demo": "half", "smollm2": "smollm2"}[part]
    small, healed = (HEALED / f"{name}-{state}" for state in ("pruned", "healed"))
    if not (healed / "report.json").is_file():
        small, healed = WORK / f"{part}-pruned", WORK / f"{part}-healed"
        common = {"checks": {"walked": 0}, "force": True}
        if not small.is_dir():
            modhifi.prune(out=small, **prune, **common)
        if not healed.is_dir():
            modhifi.heal(small, minutes=minutes, out=healed, **heal, **common)
    return {"pruned": small, "healed": healed}


def minutes_of(healed: Path) -> float:
    """How long a model was healed."""
    return float(json.loads((healed / "report.json").read_text())["healing"]["seconds"]) / 60


def demo(minutes: float) -> list[Row]:
    """The demo's ResNet at half its FLOPs, as ONNX files."""
    original = modhifi.load_model("demo:resnet")
    test = load_samples("demo:test", original, n=IMAGES)
    data = {"data": "demo:calibration", "evaluate": "demo:test"}
    pruning = {"model": "demo:resnet", "flops": "0.5x", "samples": 500, **data}
    places = models("demo", minutes, pruning, {"samples": 500, **data})
    files: dict[tuple[str, str], Path] = {}
    for name, module in {"original": original.model, **{n: modhifi.load(p) for n, p in places.items()}}.items():
        file = WORK / f"demo-{name}.onnx"
        file.parent.mkdir(parents=True, exist_ok=True)
        export(module, test.first(2), file, "onnx")
        files[name, "float32"] = file
        files[name, "int8"] = onnx_int8(file, WORK / f"demo-{name}-int8.onnx")
    runs = {key: onnx_runtime(file) for key, file in files.items()}
    times = alternating({key: lambda run=run: timed(run, test.first(1)) for key, run in runs.items()})
    return [
        {
            "model": name,
            "weights": kind,
            "healed, minutes": minutes_of(places["healed"]) if name == "healed" else None,
            "MB": megabytes(file),
            "time": times[name, kind] / times["original", "float32"],
            "top-1": accuracy(runs[name, kind], test, BATCH),
        }
        for (name, kind), file in files.items()
    ]


def timed(run: Callable[[Tensor], Tensor], item: Tensor) -> float:
    start = time.perf_counter()
    for _ in range(RUNS):
        run(item)
    return time.perf_counter() - start


def alternating(runs: dict[Any, Callable[[], float]], rounds: int = ROUNDS) -> dict[Any, float]:
    """The median time of each over rounds in which all take turns."""
    times = [{key: run() for key, run in runs.items()} for _ in range(rounds)]
    return {key: statistics.median(one[key] for one in times) for key in runs}


def language_model(minutes: float) -> list[Row]:
    """SmolLM2-135M without a fifth of its FFN neurons, as GGUF files."""
    original = smollm2()
    file = Path(str(original.source))
    method = {"only": ["neurons"], "round_to": 32}
    places = models(
        "smollm2",
        minutes,
        {"model": original, "data": "self", "ratio": 0.2, "samples": 32, "method": method},
        {"against": original, "data": "self", "samples": 64},
    )
    files = {("original", "q4_1, as it came"): file}
    for name, place in places.items():
        for kind in ("f16", "q8_0"):
            files[name, kind] = to_gguf(place, WORK / f"smollm2-{name}-{kind}.gguf", kind)
    held = {kind: KINDS[kind](original, WINDOWS, TOKENS) for kind in TEXTS}
    tokens = {kind: torch.stack([samples.load(i) for i in range(len(samples))]) for kind, samples in held.items()}
    running = {key: LlamaCpp(file) for key, file in files.items()}
    values = {key: {kind: model.perplexity(t) for kind, t in tokens.items()} for key, model in running.items()}
    dense = next(iter(values.values()))
    prompt = tokens[TEXTS[0]][0].tolist()[:PROMPT]
    reading = alternating({key: lambda m=m: m.times(prompt, 1)[0] for key, m in running.items()}, TURNS)
    writing = alternating({key: lambda m=m: m.times(prompt[:8], WRITTEN)[1] for key, m in running.items()}, TURNS)
    rows = []
    for name, kind in files:
        key, first = (name, kind), next(iter(files))
        ratios = [values[key][text] / dense[text] for text in TEXTS]
        rows.append(
            {
                "model": name,
                "weights": kind,
                "healed, minutes": minutes_of(places["healed"]) if name == "healed" else None,
                "MB": megabytes(files[key]),
                "reading": reading[key] / reading[first],
                "writing": writing[key] / writing[first],
                "worst": max(ratios),
                "mean": math.exp(statistics.mean(map(math.log, ratios))),
                **dict(zip(TEXTS, ratios, strict=True)),
            }
        )
    return rows


TABLES: dict[str, tuple[Callable[[float], list[Row]], list[str], str]] = {
    "demo": (
        demo,
        ["model", "weights", "healed, minutes", "MB", "time", "top-1"],
        f"""# After pruning: the demo's ResNet at half its FLOPs, in ONNX Runtime
`int8` by ONNX Runtime's dynamic quantisation. Time of one image on one thread over that of the original's float32 file,
median of {ROUNDS} rounds in which all take turns; top-1 in % of {IMAGES} test images.
Command: `python eval/after_pruning.py --part demo`.""",
    ),
    "smollm2": (
        language_model,
        ["model", "weights", "healed, minutes", "MB", "reading", "writing", "worst", "mean", *TEXTS],
        f"""# After pruning: SmolLM2-135M without a fifth of its FFN neurons, in llama.cpp
Time a token of reading {PROMPT} tokens and of writing {WRITTEN}, on one thread, over those of the file that was pruned
(median of {TURNS} rounds in which all take turns). Perplexity over that file's on {WINDOWS} windows of {TOKENS} tokens
of each kind of text.
Command: `python eval/after_pruning.py --part smollm2`.""",
    ),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=TABLES, action="append", help="only this one; may be repeated")
    parser.add_argument("--minutes", type=float, default=4.0, help="of healing, where nothing is healed yet")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.part or TABLES:
        make, columns, intro = TABLES[part]
        write_results(f"after_pruning_{part}", make(arguments.minutes), columns, intro)
