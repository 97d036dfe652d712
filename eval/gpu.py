"""The times and the memory of a run on an accelerator, in one go.

    python eval/gpu.py [--small]

Random weights in the shapes of ResNet-50, ViT-B/16 and Llama-2-7B. Without an accelerator, and with --small, the same
figures come from small shapes, are printed and only show that the script runs. Else they are written to
eval/results/gpu.json and .md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
import transformers
from common import write_results
from torch import Tensor

from modhifi.bounds.held_out import tabulate
from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import eliminate
from modhifi.pruning.prune import prune_model
from modhifi.pruning.readers import Reader
from modhifi.pruning.settings import PruneSettings


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    images: int
    batch: int
    pixels: int
    windows: int
    tokens: int
    blocks: int
    hidden: int
    ffn: int
    vocabulary: int
    columns: int


LARGE = Sizes(768, 64, 224, 128, 1024, 32, 4096, 11008, 32000, 11008)
SMALL = Sizes(8, 4, 64, 4, 32, 3, 32, 96, 64, 256)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = Budget("macs", 0.5)


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of a call and of all that it starts on the device."""
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def samples_of(items: list[Tensor], kind: str) -> Samples:
    names = tuple(map(str, range(len(items))))
    return Samples(items.__getitem__, names, None, names, kind, False)


def forward(loaded: LoadedModel, samples: Samples, batch: int) -> None:
    with torch.no_grad():
        for inputs in samples.batches(batch):
            loaded.run(inputs)


class Rows:
    """The figures, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, value: float, unit: str, goal: str = "") -> None:
        self.rows.append({"what": what, "value": value, "unit": unit, "goal": goal})
        print(f"{what}: {value:.4g} {unit} {goal}", flush=True)


def vision(rows: Rows, name: str, arguments: dict[str, Any], sizes: Sizes, ways: dict[str, PruneSettings]) -> None:
    """Time of a prune over that of plain forward passes over the same images."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments)
    loaded = load_model(model)
    loaded.model.to(DEVICE)
    side = arguments.get("img_size", sizes.pixels)
    samples = samples_of(list(torch.randn(sizes.images, 3, side, side)), "images")
    forward(loaded, samples, sizes.batch)
    plain = seconds(lambda: forward(loaded, samples, sizes.batch))
    for way, settings in ways.items():
        settings = replace(settings, batch_size=sizes.batch)
        whole = seconds(lambda settings=settings: prune_model(loaded, samples, HALF, settings))  # type: ignore[misc]
        rows.add(f"{name}, {way}: prune over plain passes", whole / plain, "×", "at most 4 one-shot")
        rows.add(f"{name}, {way}: prune", whole, "s")


def same_plan(rows: Rows, sizes: Sizes) -> None:
    """The share of components on which the CPU and the device agree."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    samples = samples_of(list(torch.randn(32, 3, 64, 64)), "images")
    plans = []
    for device in (torch.device("cpu"), DEVICE):
        loaded = load_model(model)
        loaded.model.to(device)
        plans.append(prune_model(loaded, samples, HALF, PruneSettings(weighting="energy")).plan.kept)
    kept = [{(name, c) for name, components in plan.items() for c in components} for plan in plans]
    rows.add("resnet18: components kept by both CPU and device", len(kept[0] & kept[1]) / len(kept[0]), "", "0.99")


def llama(rows: Rows, sizes: Sizes) -> None:
    """A language model from loaded weights to plan and weights, and to measured outputs."""
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=max(1, sizes.hidden // 128),
        num_key_value_heads=max(1, sizes.hidden // 128),
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    loaded = load_model(model)
    loaded.model.to(DEVICE)
    texts = torch.randint(0, sizes.vocabulary, (sizes.windows + 8, sizes.tokens))
    samples, held = (samples_of(list(part), "tokens") for part in texts.split((sizes.windows, 8)))
    settings = PruneSettings(rows_per_column=None, batch_size=4, layout="uniform", only=("neurons",))
    marks: dict[int, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage.strip() == "pruning blocks":
            marks.setdefault(done, time.perf_counter())

    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result: list[Any] = []
    budget = Budget("components", 0.8)
    whole = seconds(lambda: result.append(prune_model(loaded, samples, budget, settings, progress=progress)))
    rows.add("Llama-2-7B's shape, 20 % of the FFN: plan and weights", whole, "s", "25")
    times = [marks[i + 1] - marks[i] for i in range(sizes.blocks)]
    rows.add("last block over the second", times[-1] / times[1], "×", "1.2")
    rows.add("outputs of both on 8 windows", seconds(lambda: tabulate(loaded, result[0].model, held, 4)), "s")
    if DEVICE.type == "cuda":
        rows.add("peak of device memory", torch.cuda.max_memory_allocated() / 2**30, "GiB", "45")


def elimination(rows: Rows, columns: int) -> None:
    """Optimal Brain Surgeon of one reader, 30 % of its columns removed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(columns, 2 * columns, generator=generator).to(DEVICE)
    second = (x @ x.T / (2 * columns)).double()[None]
    weight = torch.randn(1, 256, columns, generator=generator).to(DEVICE).double()
    reader = Reader(weight, second, torch.zeros(columns, dtype=torch.int64), torch.arange(columns)[:, None])
    taken = seconds(lambda: eliminate([reader], keep_at_least=columns - int(0.3 * columns)))
    rows.add(f"elimination in {columns} columns, 30 % removed", taken, "s", "3 for 11,008")


def commands(rows: Rows, devices: tuple[str, ...]) -> None:
    """The demo, forgetting a class and drawing images from norms, by the command line."""
    for device in devices:
        for name, command in {
            "demo": "demo",
            "unlearn": "unlearn demo:resnet --forget frog --data demo:calibration --evaluate demo:test",
            "synthetic:invert": "prune demo:resnet --flops 0.5x --data synthetic:invert --samples 64",
        }.items():
            with tempfile.TemporaryDirectory() as place:
                where = [] if name == "demo" else ["--device", device]
                line = [sys.executable, "-m", "modhifi", *command.split(), *where, "--out", f"{place}/out", "--quiet"]
                taken = seconds(lambda line=line: subprocess.run(line, check=True, timeout=90))  # type: ignore[misc]
            rows.add(f"modhifi {name}, {device}", taken, "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes")
    small = parser.parse_args().small or DEVICE.type == "cpu"
    sizes, rows = (SMALL if small else LARGE), Rows()
    one_shot, dense = PruneSettings(), PruneSettings(sequential="dense")
    network = "test_resnet" if small else "resnet50"
    vision(rows, network, {}, sizes, {"one shot": one_shot, "sequential dense": dense})
    uniform = {"one shot": replace(one_shot, layout="uniform")}
    shape = {"img_size": sizes.pixels, "depth": 2, "embed_dim": 48, "num_heads": 3} if small else {}
    vision(rows, "vit_base_patch16_224", shape, sizes, uniform)
    elimination(rows, sizes.columns)
    llama(rows, sizes)
    if small:
        return
    same_plan(rows, sizes)
    commands(rows, ("cpu", "cuda"))
    write_results(
        "gpu",
        rows.rows,
        ["what", "value", "unit", "goal"],
        f"""# Times on an accelerator
Random weights, {sizes.images} images of {sizes.pixels} px, {sizes.windows} windows of {sizes.tokens} tokens, on
{torch.cuda.get_device_name()}. Command: `python eval/gpu.py`.""",
    )


if __name__ == "__main__":
    main()
