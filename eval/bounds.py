"""The ladder of bounds for pruning at 10, 25 and 50 %: the demo's ResNet, transformers and ConvNeXt, SmolLM2-135M.

    MODHIFI_DATA=DIR python eval/bounds.py [--part resnet|vit|convnext|smollm2]

ResNet: calibrated on 200 of the demo's unlabelled images, bounded on 1,000 CIFAR-10 test images. ViT and ConvNeXt have
random weights (none are to be had offline): their figures show the rungs, not a useful model. SmolLM2: FFN neurons, the
same share in every block; WikiText-2 articles, apart for calibration and bounds. Writes eval/results/bounds*.{md,json}.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from common import DEMO_MODEL, Missing, cifar10, reference, wikitext_file, write_results
from lm_prune import smollm2
from torch import nn

from modhifi.bounds.certified import certify
from modhifi.bounds.ladder import BoundReport, verify_model
from modhifi.bounds.propagation.affine import Norms
from modhifi.bounds.propagation.newton import ROUNDS
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import Pruned, apply_plan, choose_groups, find_structure, make_plan, measure_moments
from modhifi.structure.expand import expand

RATIOS = (0.1, 0.25, 0.5)
# Depths, evenly spread, from which on the edits are bounded alone.
POINTS = 10
COLUMNS = [
    "removed",
    "self-test",
    "flips",
    "flips at most (R3)",
    "R4 measured",
    "R2",
    "R1 theorem",
    "R1 every input",
    "constant predictor",
    "R1 / R2",
    "R2 of 1 round",
    "R2 of 2",
    "R1 informative from",
    "R2 informative from",
    "CPU seconds",
    "of it R3",
]
LEGEND = (
    "Changes of the output are Euclidean; R1, R2 and R4 are root mean squares over the {walked} walked, R3 is "
    "one-sided at 95 % over {units}. A bound is informative below the error of a predictor of the mean output; "
    "`informative from` is the first of up to {points} modified layers such that the edits from there to the head "
    "alone have such a bound; a rung without a figure is not available, the JSON says why. R2 takes {rounds} rounds of "
    "Newton's method; `R2 of 1 round` is the first-order effect and what it may miss. CPU seconds are those of the "
    "whole ladder on one thread, and of R3's two passes for each unit."
)
PER_BLOCK = "*.mlp.*"


def resnet(walked: int) -> None:
    loaded = reference("demo")
    calibration = load_samples(f"images:{DEMO_MODEL.parent / 'images' / 'calibration'}", loaded, n=200)
    held = load_samples(f"images:{cifar10() / 'test'}", loaded, n=1000)
    bound(
        "bounds",
        "Pruning the demo's ResNet-18 by share of components.",
        loaded,
        calibration,
        held,
        walked,
        PruneSettings(),
    )


def untrained(name: str, title: str, architecture: str, walked: int, **arguments: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=10, **arguments)
    model.pretrained_cfg.update(input_size=(3, 64, 64), crop_pct=1.0)
    loaded = load_model(model.eval(), example=torch.randn(2, 3, 64, 64))
    items = [
        load_samples(f"images:{cifar10() / part}", reference("demo"), n=n)
        for part, n in (("train", 200), ("test", 1000))
    ]
    bound(name, title, loaded, *(enlarged(s, 64) for s in items), walked, PruneSettings(only=(PER_BLOCK,)))


def enlarged(samples: Samples, size: int) -> Samples:
    def load(i: int) -> torch.Tensor:
        return nn.functional.interpolate(samples.load(i)[None], size=(size, size), mode="bilinear")[0]

    return dataclasses.replace(samples, load=load)


def language(walked: int, windows: int = 24, held: int = 48, window: int = 128) -> None:
    loaded = smollm2()
    samples = load_samples(f"text:{wikitext_file()}", loaded, n=windows + held, window=window)
    calibration, rest = samples.split(windows, held)
    settings = PruneSettings(
        rows_per_column=None, batch_size=4, layout="uniform", weighting="energy", only=(PER_BLOCK,)
    )
    title = (
        f"Pruning FFN neurons of SmolLM2-135M, the same share in every block, calibrated on {len(calibration)} windows "
        f"of {window} tokens, far too few for a good model; flips are of the next token, by share of a window."
    )
    columns = ["perplexity ratio", "perplexity ratio at most (R3)"]
    bound("bounds_smollm2", title, loaded, calibration, rest, walked, settings, columns)


def bound(
    name: str,
    title: str,
    loaded: LoadedModel,
    calibration: Samples,
    held: Samples,
    walked: int,
    settings: PruneSettings,
    columns: list[str] | None = None,
) -> None:
    structure = choose_groups(find_structure(loaded), settings)
    moments = measure_moments(loaded, structure, calibration, settings.sampling)
    print(f"{name}: measured", flush=True)
    curves = removal_curves(loaded.model, structure, moments, settings)
    print(f"{name}: scored", flush=True)
    rows, content = [], {}
    for ratio in RATIOS:
        plan = make_plan(loaded.model, structure, curves, Budget("components", 1 - ratio), settings)
        pruned = apply_plan(loaded, structure, plan, moments, settings)
        marks = [time.process_time()]
        report = verify_model(
            loaded,
            pruned.model,
            expand(pruned.model, loaded.model, pruned.structure, pruned.plan),
            held,
            walked=walked,
            batch_size=settings.batch_size,
            progress=lambda stage, done, total, marks=marks: marks.append(time.process_time()),
        )
        seconds = {"CPU seconds": marks[-1] - marks[0], "of it R3": marks[2] - marks[1]}
        rows.append(row(ratio, report) | seconds)
        if rows[-1]["R1 theorem"] is not None:  # R2 alone, layer by layer, takes hours on a language model
            rows[-1] |= depths(loaded, pruned, held, report, walked)
        content[f"{ratio:.0%}"] = report.to_json()["bounds"]
        print({k: v for k, v in rows[-1].items() if k != "by depth"}, flush=True)
    units = "sequences" if loaded.kind == "text" else "images"
    legend = LEGEND.format(walked=f"{walked} {units}", units=f"{len(held)} {units}", points=POINTS, rounds=ROUNDS)
    write_results(name, rows, [*COLUMNS[:4], *(columns or []), *COLUMNS[4:]], f"{title} {legend}", bounds=content)


def row(ratio: float, report: BoundReport) -> dict[str, Any]:
    rungs = {r.name: r.value for r in report.rungs}
    flips, perplexity = report.statistical.flips, report.statistical.perplexity
    local, theorem = rungs["R2 certified-local"], rungs["R1 theorem form"]
    return {
        "removed": f"{ratio:.0%}",
        "flips": flips.measured,
        "flips at most (R3)": flips.upper,
        "perplexity ratio": perplexity.measured if perplexity else None,
        "perplexity ratio at most (R3)": perplexity.upper if perplexity else None,
        "R4 measured": rungs["R4 measured"],
        "R2": local,
        "R1 theorem": theorem,
        "R1 every input": rungs["R1 every input"],
        "R1 / R2": theorem / local if theorem and local else None,
        "constant predictor": report.constant_error,
        "self-test": report.verdicts[0].verdict,
    }


def depths(loaded: LoadedModel, pruned: Pruned, held: Samples, report: BoundReport, walked: int) -> dict[str, Any]:
    """How deep an edit may begin and still have an informative bound, for R1 and R2; edits before it are undone."""
    dense = copy.deepcopy(loaded.model).cpu().double()
    edited = expand(pruned.model, loaded.model, pruned.structure, pruned.plan).double()
    batch = torch.stack([held.load(i) for i in range(walked)])
    batch = batch.double() if batch.is_floating_point() else batch
    norms = Norms(whole_box=False)
    few = [certify(loaded, dense, edited, batch, norms, rounds) for rounds in (1, 2)]
    found: dict[str, Any] = {"R2 of 1 round": rms(few[0].local), "R2 of 2": rms(few[1].local), "by depth": []}
    batch = batch[:4]
    whole = certify(loaded, dense, edited, batch, norms)
    for start in range(0, len(whole.layers), math.ceil(len(whole.layers) / POINTS)):
        undo(edited, dense, [n for _, names, _, _ in whole.layers[:start] for n in names])
        part = certify(loaded, dense, edited, batch, norms)
        local = rms(part.local)
        figures = {"from": whole.layers[start][0], "R1": part.expected, "R2": local, "ratio": part.expected / local}
        found["by depth"].append(figures)
    for rung in ("R1", "R2"):
        good = [d["from"] for d in found["by depth"] if d[rung] < report.constant_error]
        found[f"{rung} informative from"] = good[0] if good else "nowhere"
    return found


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def undo(edited: nn.Module, dense: nn.Module, names: list[str]) -> None:
    original = dense.state_dict()
    for name, value in edited.state_dict().items():
        if name in names:
            value.copy_(original[name])


PARTS: dict[str, Callable[[], None]] = {
    "resnet": lambda: resnet(16),
    "vit": lambda: untrained(
        "bounds_vit",
        "Pruning FFN neurons of a ViT-Tiny of six blocks with RANDOM weights.",
        "vit_tiny_patch16_224",
        16,
        img_size=64,
        depth=6,
    ),
    "convnext": lambda: untrained(
        "bounds_convnext",
        "Pruning FFN neurons of a ConvNeXt-Atto with RANDOM weights.",
        "convnext_atto",
        8,
        ls_init_value=0.5,
    ),
    "smollm2": lambda: language(1),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="Repeat it; all by default.")
    for part in parser.parse_args().part or PARTS:
        try:
            PARTS[part]()
        except Missing as missing:
            print(f"{part}: not run; {missing}")
