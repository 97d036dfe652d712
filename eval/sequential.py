"""Sequential compensation against one shot, and BatchNorm re-estimation: which wins on which model and data.

    MODHIFI_DATA=DIR python eval/sequential.py [--part NAME] [--only METHODS] [--data KIND]

DIR holds cifar10.tar.gz, wikitext2-valid.txt and, for the part resnet50, resnet50_cifar10 (a directory of timm). Rows
that eval/results/sequential.json has are not measured again; without a part all of them run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, Missing, accuracy, cifar10, perplexity, reference, write_results
from lm_prune import SETTINGS as TEXT
from lm_prune import smollm2, wikitext
from torch import Tensor, nn

from modhifi.bounds.held_out import tabulate
from modhifi.calibration.batchnorm import reestimate_batchnorm
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning import sequential
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.sequential import PairedPasses
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments
from modhifi.pruning.weightings import WEIGHTINGS
from modhifi.structure.operators import weight_matrix

HELD = 1000
METHODS = ("one shot", "own", "dense", "mean")
KEYS = ["model", "data", "samples", "kept", "method"]
COLUMNS = [*KEYS, "top-1", "agreement", "BatchNorm re-estimated: top-1", "agreement then", "perplexity over dense"]
INTRO = """# Sequential compensation against one shot
The same plan compensated in one shot, and reader after reader on the inputs of the pruned prefix: towards what the
layer's own weights make of them (own), the dense model's output (dense), or the mean of both. `kept` is the share of
the FLOPs, for the language model of the FFN's neurons. Held out are 1000 CIFAR-10 test images, or 16 windows of
WikiText-2; agreement is with the dense model's top-1. No training. Command: `python eval/sequential.py`."""


@dataclass(frozen=True)
class Only:
    """The methods to measure, and the kind of images, empty for both."""

    methods: tuple[str, ...]
    data: str


class MeanPasses(PairedPasses):
    """The target is halfway between the dense model's output and the layer's own on the pruned prefix."""

    def _pair(self, reader: str, first: int, batch: Tensor) -> tuple[Tensor, Tensor]:
        rows, dense = super()._pair(reader, first, batch)
        module = self.model.get_submodule(reader)
        own = weight_matrix(module).float() @ rows.float()
        if getattr(module, "bias", None) is not None:
            own += module.bias.view(len(own), -1, 1)
        return rows, (dense + own) / 2


class Table:
    """The rows measured so far, written after each."""

    def __init__(self) -> None:
        file = RESULTS / "sequential.json"
        self.rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.is_file() else []

    def add(self, figures: Callable[[], dict[str, Any]], **key: Any) -> None:
        if any(key.items() <= row.items() for row in self.rows):
            return
        self.rows.append({**key, **figures()})
        self.rows.sort(key=lambda row: [str(row[name]) for name in KEYS])
        write_results("sequential", self.rows, COLUMNS, INTRO)


def versions(
    loaded: LoadedModel, samples: Samples, budgets: list[Budget], settings: PruneSettings
) -> Iterator[tuple[float, str, Callable[[], nn.Module]]]:
    """By what is kept and by method, what makes the pruned model; one plan for each budget."""
    structure = choose_groups(find_structure(loaded), settings)
    moments = measure_moments(loaded, structure, samples, settings.sampling)
    curves = removal_curves(loaded.model, structure, moments, settings, trial=0.3)
    for budget in budgets:
        if settings.layout == "uniform":
            plan = make_plan(loaded.model, structure, curves, budget, settings)
        else:
            weighting = WEIGHTINGS[settings.weighting]
            plan = weighting.plan(loaded, structure, curves, moments, samples, budget, settings, lambda *_: None).plan
        for method in METHODS:
            target = {"one shot": None, "mean": "dense"}.get(method, method)

            def make(plan: Any = plan, target: str | None = target, mean: bool = method == "mean") -> nn.Module:
                with patch.object(sequential, "PairedPasses", MeanPasses if mean else PairedPasses):
                    own = replace(settings, sequential=target)
                    return apply_plan(loaded, structure, plan, moments, own, samples).model

            yield budget.keep, method, make


def images(
    name: str, make: Callable[[], LoadedModel], counts: dict[str, int], keeps: list[float], only: Only, layout: str
) -> None:
    root, table, loaded = cifar10(), Table(), make()
    held = load_samples(f"images:{root / 'test'}", loaded, n=HELD)
    for data, count in counts.items():
        if only.data not in ("", data):
            continue
        source = f"images:{root / 'train'}" if data == "real" else data
        samples = load_samples(source, loaded, n=count)

        def figures(make: Callable[[], nn.Module], real: bool = data == "real", samples: Samples = samples) -> Any:
            model = make()
            result = of_images(loaded, model, held)
            norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
            if real and norms:
                again = copy.deepcopy(model)
                reestimate_batchnorm(again, loaded, samples, 32)
                more = of_images(loaded, again, held)
                result |= {"BatchNorm re-estimated: top-1": more["top-1"], "agreement then": more["agreement"]}
            return result

        budgets = [Budget("macs", keep) for keep in keeps]
        for keep, method, make in versions(loaded, samples, budgets, PruneSettings(layout=layout)):
            if method in only.methods:
                table.add(partial(figures, make), model=name, data=data, samples=count, kept=keep, method=method)


def of_images(loaded: LoadedModel, model: nn.Module, held: Samples) -> dict[str, float]:
    top = accuracy(lambda batch: loaded.logits(batch, model), held, 100)
    return {"top-1": top, "agreement": 100 * float(tabulate(loaded, model, held, 100).agreement.mean())}


def text(only: Only, windows: int = 32, ratio: float = 0.2) -> None:
    loaded, table = smollm2(), Table()
    samples, held = wikitext(loaded, windows)
    dense = perplexity(loaded.logits, held)
    for keep, method, make in versions(loaded, samples, [Budget("components", 1 - ratio)], TEXT):
        if method in only.methods:

            def figures(make: Callable[[], nn.Module] = make) -> dict[str, float]:
                return {"perplexity over dense": perplexity(partial(loaded.logits, model=make()), held) / dense}

            table.add(figures, model="SmolLM2-135M", data="real", samples=windows, kept=keep, method=method)


def resnet50() -> LoadedModel:
    place = Path(os.environ.get("MODHIFI_DATA", "")) / "resnet50_cifar10"
    if not place.is_dir():
        raise Missing("set MODHIFI_DATA to a directory that holds resnet50_cifar10")
    return load_model(place)


BOTH = {"real": 256, "synthetic": 256}
HALF, QUARTER = 0.5, 0.25
PARTS: dict[str, Callable[[Only], None]] = {
    "demo": lambda only: images("demo's ResNet", lambda: reference("demo"), BOTH, [HALF, QUARTER], only, "global"),
    "resnet": lambda only: images("ResNet", lambda: reference("resnet"), BOTH, [HALF, QUARTER], only, "global"),
    "vgg": lambda only: images("VGG", lambda: reference("vgg"), BOTH, [HALF, QUARTER], only, "global"),
    "swin": lambda only: images("Swin", lambda: reference("swin"), BOTH, [HALF], only, "uniform"),
    "resnet50": lambda only: images(
        "ResNet-50", resnet50, {"real": 1000, "synthetic": 1000}, [1 / 4.07], only, "global"
    ),
    "smollm2": text,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--only", default=",".join(METHODS), help="methods, with commas between")
    parser.add_argument("--data", default="", choices=["", "real", "synthetic"], help="only this kind of images")
    options = parser.parse_args()
    torch.manual_seed(0)
    for part in [options.part] if options.part else PARTS:
        try:
            PARTS[part](Only(tuple(options.only.split(",")), options.data))
        except Missing as missing:
            print(f"{part}: not run: {missing}")
