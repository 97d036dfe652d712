"""How many torch operations one prune dispatches, and where: on an accelerator each costs its launch.

python eval/launches.py [--before FILE]

Counts do not depend on the size of images or on the width of layers, so small ones stand for large ones. ``--before``
is the launches.json of an earlier version; its counts stand beside. Writes eval/results/launches.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from common import write_results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import modhifi
from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings

PACKAGE = str(Path(modhifi.__file__).parent)
# The rooms whose operations are counted apart; files of other rooms work for whoever calls them.
PARTS = {"calibration": "collecting", "pruning": "solving", "models": "the model's own passes"}
STRUCTURE = ("tracing", "trial_cut", "surgery", "clone")
RESNET_BATCHES, LLAMA_BATCHES, BLOCKS = 12, 16, 30
# How many places are listed.
PLACES = 12


class Launches(TorchDispatchMode):
    """Counts operations by part of the run and by the function that asked for them; views are no launch."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        part, place = whose()
        self.parts[part] += 1
        self.views[part] += func.is_view
        self.places[f"{part}: {place}"] += 1
        return func(*args, **(kwargs or {}))


def whose() -> tuple[str, str]:
    """The part of a run that the innermost function of the package belongs to, and that function."""
    frame = sys._getframe(2)
    place = ""
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(PACKAGE) and name != "__torch_function__":
            inside = file[len(PACKAGE) + 1 :].removesuffix(".py")
            place = place or f"{inside}.{name}"
            room, _, rest = inside.partition("/")
            if room == "structure" and rest.startswith(STRUCTURE):
                return "tracing and cutting", place
            if room in PARTS:
                return PARTS[room], place
        frame = frame.f_back  # type: ignore[assignment]
    return "other", place


def counted(model: Any, items: list[Tensor], kind: str, budget: Budget, settings: PruneSettings) -> Launches:
    names = tuple(str(i) for i in range(len(items)))
    samples = Samples(lambda i: items[i], names, None, names, kind, False)
    with Launches() as launches:
        prune_model(load_model(model), samples, budget, settings)
    return launches


def resnet50() -> Launches:
    torch.manual_seed(0)
    size = 4
    images = list(torch.randn(RESNET_BATCHES * size, 3, 64, 64))
    settings = PruneSettings(batch_size=size)
    return counted(timm.create_model("resnet50"), images, "image", Budget("macs", 0.5), settings)


def llama(layout: str, ratio: float = 0.2, size: int = 2, length: int = 256) -> Launches:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    texts = list(torch.randint(0, 64, (LLAMA_BATCHES * size, length)))
    settings = PruneSettings(batch_size=size, layout=layout, only=("neurons",))
    model = transformers.LlamaForCausalLM(config)
    return counted(model, texts, "tokens", Budget("components", 1 - ratio), settings)


RUNS = {
    f"ResNet-50, {RESNET_BATCHES} batches, FLOPs × 0.5": resnet50,
    f"Llama, {BLOCKS} blocks, {LLAMA_BATCHES} batches, neurons × 0.8, uniform": lambda: llama("uniform"),
    f"Llama, {BLOCKS} blocks, {LLAMA_BATCHES} batches, neurons × 0.8, global": lambda: llama("global"),
}

INTRO = """# Operations that one prune dispatches
Counted by a `TorchDispatchMode`, random weights, small images and widths: by part of the run, and by the functions that
ask for most. *views* are those of *operations* that start nothing on a device. Command: `python eval/launches.py`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="launches.json of an earlier version")
    file = parser.parse_args().before
    before = json.loads(file.read_text())["rows"] if file else []
    known = {(row["run"], row["part"]): row["operations"] for row in before}
    rows: list[dict[str, Any]] = []
    for run, count in RUNS.items():
        launches = count()
        solved = launches.parts["collecting"] + launches.parts["solving"]
        parts = {"collecting and solving": (solved, launches.views["collecting"] + launches.views["solving"])}
        parts |= {part: (number, launches.views[part]) for part, number in launches.parts.most_common()}
        parts |= {place: (number, None) for place, number in launches.places.most_common(PLACES)}
        for part, (number, views) in parts.items():
            row = {"run": run, "part": part, "operations": number, "views": views}
            rows.append(row | ({"before": known.get((run, part))} if before else {}))
    columns = ["run", "part", *(["before"] if before else []), "operations", "views"]
    write_results("launches", rows, columns, INTRO)


if __name__ == "__main__":
    main()
