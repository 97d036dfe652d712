"""Pruning conv nets without training: a ladder of methods, peers, and the cost of scoring.

    MODHIFI_DATA=DIR python eval/vision_prune.py [--part ladder|further|imagenet|cost]

Without a part all of them run, and parts whose data or packages are missing say so.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace

import torch
from common import Missing, cifar10, efficientnet_lite0, imagenet_sample, reference, write_results
from common import accuracy as top1
from torch import nn

from modhifi.bounds.held_out import tabulate
from modhifi.calibration.batchnorm import reestimate_batchnorm
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments
from modhifi.runs import measure

LADDER = [
    ("magnitude", "none"),
    ("naive", "none"),
    ("energy", "none"),
    ("naive", "delta"),
    ("energy", "delta"),
    ("magnitude", "lstsq"),
    ("naive", "lstsq"),
    ("energy", "lstsq"),
    ("obs", "lstsq"),
    ("obs", "lstsq, order behind norms"),
    ("obs", "lstsq, sequential dense"),
]


def cached(samples: Samples) -> Samples:
    """The same samples, loaded once."""
    items = [samples.load(i) for i in range(len(samples))]
    return replace(samples, load=items.__getitem__)


def accuracy(loaded: LoadedModel, model: nn.Module, samples: Samples) -> float:
    return top1(lambda b: loaded.logits(b, model), samples, 200)


def flops_share(loaded: LoadedModel, model: nn.Module) -> float:
    x = loaded.example[:1]
    return measure.count_flops(model, x) / measure.count_flops(loaded.model, x)


def cifar(test: int = 2000) -> tuple[LoadedModel, Samples, Samples]:
    loaded, root = reference("demo"), cifar10()
    calibration = cached(load_samples(f"images:{root / 'train'}", loaded, n=1000))
    held = cached(load_samples(f"images:{root / 'test'}", loaded, n=test))
    return loaded, calibration, held


def ladder() -> None:
    loaded, calibration, held = cifar()
    dense = accuracy(loaded, loaded.model, held)
    rows = [{"method": "dense", "removed": 0.0, "accuracy": dense, "FLOPs kept": 1.0}]
    inner = PruneSettings(layout="uniform", coupled=False)
    structure = choose_groups(find_structure(loaded), inner)
    moments = measure_moments(loaded, structure, calibration, inner.sampling)
    orders = {(selector, "behind norms" in how) for selector, how in LADDER}
    curves = {
        key: removal_curves(loaded.model, structure, moments, replace(inner, selector=key[0], behind_norms=key[1]))
        for key in sorted(orders)
    }
    for ratio in (0.25, 0.5, 0.75):
        for selector, compensate in LADDER:
            kind, _, more = compensate.partition(", ")
            sequential = more.removeprefix("sequential ") if "sequential" in more else None
            settings = replace(inner, selector=selector, compensate=kind, sequential=sequential)
            curve = curves[selector, "behind norms" in more]
            plan = make_plan(loaded.model, structure, curve, Budget("components", 1 - ratio), settings)
            pruned = apply_plan(loaded, structure, plan, moments, settings, calibration)
            rows.append(row(loaded, pruned.model, calibration, held, f"{selector} + {compensate}", ratio))
        for name, model in torch_pruning(loaded, ratio, flops_share(loaded, pruned.model)):
            rows.append(row(loaded, model, calibration, held, name, ratio))
    write_results(
        "vision_prune_ladder",
        rows,
        ["method", "removed", "FLOPs kept", "accuracy", "accuracy, BatchNorm re-estimated"],
        f"""# Ladder of methods, no training
The demo's ResNet on {len(held)} CIFAR-10 test images; the same share of the inner channels of every block removed;
{len(calibration)} unlabelled training images. `naive` is the paper's selection, `delta` its compensation.
Torch-Pruning prunes magnitudes on its own choice of groups, down to the FLOPs of the rows above.
Command: `python eval/vision_prune.py --part ladder`.""",
    )


def row(
    loaded: LoadedModel, model: nn.Module, calibration: Samples, held: Samples, name: str, ratio: float
) -> dict[str, object]:
    result = {
        "method": name,
        "removed": ratio,
        "FLOPs kept": flops_share(loaded, model),
        "accuracy": accuracy(loaded, model, held),
    }
    again = copy.deepcopy(model)
    reestimate_batchnorm(again, loaded, calibration, 100)
    result["accuracy, BatchNorm re-estimated"] = accuracy(loaded, again, held)
    print(result, flush=True)
    return result


def torch_pruning(loaded: LoadedModel, ratio: float, flops: float) -> list[tuple[str, nn.Module]]:
    """Torch-Pruning's magnitude pruner, local and global, without fine-tuning, to the same FLOPs by bisection."""
    try:
        import torch_pruning as tp
    except ImportError:
        print("Torch-Pruning is not installed (pip install torch-pruning): its rows are left out")
        return []
    result = []
    for scope in (False, True):
        low, high, best = 0.0, 0.95, None
        for _ in range(9):
            middle = (low + high) / 2
            model = copy.deepcopy(loaded.model).requires_grad_(True)
            ignored = [m for m in model.modules() if isinstance(m, nn.Linear)]
            pruner = tp.pruner.MagnitudePruner(
                model,
                loaded.example[:1],
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=middle,
                global_pruning=scope,
                ignored_layers=ignored,
            )
            pruner.step()
            share = flops_share(loaded, model)
            if best is None or abs(share - flops) < best[0]:
                best = (abs(share - flops), model)
            low, high = (middle, high) if share > flops else (low, middle)
        assert best is not None
        result.append(
            (f"Torch-Pruning magnitude, {'global' if scope else 'local'}", best[1].requires_grad_(False).eval())
        )
    return result


FURTHER: list[tuple[str, dict[str, object]]] = [
    ("inner channels, uniform", dict(layout="uniform", coupled=False)),
    ("all groups, uniform", dict(layout="uniform")),
    ("inner channels, global by energy", dict(coupled=False, weighting="energy")),
    ("inner channels, global by amplification", dict(coupled=False)),
    ("all groups, global by energy", dict(weighting="energy")),
    ("all groups, global by amplification", dict()),
    ("the same, ridge 1e-3", dict(ridge=1e-3)),
    ("the same, ridge 1e-5", dict(ridge=1e-5)),
    ("the same, 4 rows per column", dict(rows_per_column=4)),
    ("the same, 16 rows per column", dict(rows_per_column=16)),
    ("the same, order by errors behind the norms", dict(behind_norms=True)),
    ("the same, sequential, own target", dict(sequential="own")),
    ("the same, sequential, dense target", dict(sequential="dense")),
]


def further() -> None:
    loaded, calibration, held = cifar()
    rows = []
    for keep in (0.5,):
        for name, settings in FURTHER:
            pruned = prune_model(loaded, calibration, Budget("macs", keep), PruneSettings(**settings))  # type: ignore[arg-type]
            rows.append(row(loaded, pruned.model, calibration, held, name, 1 - keep))
        model = two_rounds(loaded, calibration, keep)
        rows.append(row(loaded, model, calibration, held, "the same, in two rounds", 1 - keep))
    write_results(
        "vision_prune_further",
        rows,
        ["method", "FLOPs kept", "accuracy", "accuracy, BatchNorm re-estimated"],
        f"""# What goes further, at equal FLOPs
`obs + lstsq` on the demo's ResNet ({accuracy(loaded, loaded.model, held):.2f} % on {len(held)} test images),
{len(calibration)} unlabelled training images, no training. "The same" is all groups, global by amplification.
Command: `python eval/vision_prune.py --part further`.""",
    )


def two_rounds(loaded: LoadedModel, calibration: Samples, keep: float) -> nn.Module:
    """Selection and least squares in turn: half of the way, moments again on the pruned model, the rest."""
    half = keep**0.5
    first = prune_model(loaded, calibration, Budget("macs", half), PruneSettings())
    again = replace(loaded, model=first.model)
    return prune_model(again, calibration, Budget("macs", keep / half), PruneSettings()).model


IMAGENET: list[tuple[str, dict[str, object]]] = [
    ("amplification, inner channels", dict(coupled=False)),
    ("amplification, all groups", dict()),
    ("uniform, inner channels", dict(coupled=False, layout="uniform")),
]


def imagenet() -> None:
    loaded = efficientnet_lite0()
    images = load_samples(f"images:{imagenet_sample()}", loaded, n=500)
    calibration, held = cached(images.subset(range(250))), cached(images.subset(range(250, 500)))
    rows = [{"method": "dense", "FLOPs kept": 1.0, "top-1": accuracy(loaded, loaded.model, held), "agreement": 100.0}]
    for name, settings in IMAGENET:
        pruned = prune_model(loaded, calibration, Budget("macs", 0.8), PruneSettings(**settings))  # type: ignore[arg-type]
        table = tabulate(loaded, pruned.model, held, 64)
        rows.append(
            {
                "method": name,
                "FLOPs kept": flops_share(loaded, pruned.model),
                "top-1": accuracy(loaded, pruned.model, held),
                "agreement": 100 * float(table.agreement.mean()),
                "relative output error": table.relative_error,
            }
        )
        print(rows[-1], flush=True)
    write_results(
        "vision_prune_imagenet",
        rows,
        ["method", "FLOPs kept", "top-1", "agreement", "relative output error"],
        """# tf_efficientnet_lite0 with ImageNet weights, FLOPs x 0.8
250 ImageNet samples for calibration, the other 250 for the figures; agreement is with the dense model's top-1, in
percent. Command: `python eval/vision_prune.py --part imagenet`.""",
    )


def forward_seconds(loaded: LoadedModel, samples: Samples) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        for batch in samples.batches(32):
            loaded.logits(batch)
    return time.perf_counter() - start


def cost() -> None:
    """Time of collecting, scoring, planning and editing over that of plain forward passes, ResNet-50, 224 px."""
    loaded = load_model("timm:resnet50", pretrained=False, model_args={"zero_init_last": False})
    drawn = cached(load_samples("synthetic", loaded, n=256, balanced=False))
    real = cached(load_samples(f"images:{imagenet_sample()}", loaded, n=256))
    rows = []
    forward_seconds(loaded, real)
    for name, calibration, settings in (
        ("ImageNet images, all groups", real, PruneSettings()),
        ("ImageNet images, inner channels", real, PruneSettings(coupled=False)),
        ("synthetic images (batch statistics), all groups", drawn, PruneSettings()),
    ):
        first = forward_seconds(loaded, calibration)
        start = time.perf_counter()
        find_structure(loaded)
        found = time.perf_counter()
        prune_model(loaded, calibration, Budget("macs", 0.5), settings)
        groups, whole = found - start, time.perf_counter() - found
        forward = (first + forward_seconds(loaded, calibration)) / 2
        rows.append(
            {
                "run": name,
                "forward s": forward,
                "prune s": whole,
                "of it finding groups s": groups,
                "ratio": (whole - groups) / forward,
                "ratio with finding groups": whole / forward,
            }
        )
        print(rows[-1], flush=True)
    write_results(
        "vision_prune_cost",
        rows,
        ["run", "forward s", "prune s", "of it finding groups s", "ratio", "ratio with finding groups"],
        """# Cost of a whole prune over plain forward passes
ResNet-50 (random weights) at 224 px, 256 images, `obs` and least squares, half the FLOPs: wall time of collecting,
scoring, planning and editing over that of plain forward passes over the same images, once before and once after.
Tracing the model and trying its groups out, which `modhifi check` does too, is timed apart.
Command: `python eval/vision_prune.py --part cost`.""",
    )


PARTS = {"ladder": ladder, "further": further, "imagenet": imagenet, "cost": cost}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    wanted = parser.parse_args().part
    for part in [wanted] if wanted else PARTS:
        try:
            PARTS[part]()
        except Missing as missing:
            print(f"{part}: not run: {missing}")
