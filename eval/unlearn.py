"""Forget CIFAR-10 classes on a reference model with every method, and attack the results.

    MODHIFI_DATA=DIR python eval/unlearn.py [--model resnet|vgg|swin|demo] [--classes 0,3,6] [--methods NAMES]

Edits see 200 training images per class, attacks learn from 100 others per class, and all is tested on test images.
Every edit lies in the last stages, so what comes before is computed once and shared. Beside each method stand models
that were trained without the class, where there are any (``eval/models/MODEL-without-CLASS``, train_reference.py).
Results and the plot go to ``eval/results/unlearn_MODEL.{md,json,png}``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from common import RESULTS, Missing, cifar10, reference, write_results
from matplotlib.figure import Figure
from torch import Tensor, nn

from modhifi.calibration.prefix_cache import Passes
from modhifi.data.labels import populations
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.unlearning.attacks import Attacked
from modhifi.unlearning.attacks import attack as run_attacks
from modhifi.unlearning.batchnorm import settle_norms, settled_names
from modhifi.unlearning.data import UnlearnData
from modhifi.unlearning.edit import blend, forget
from modhifi.unlearning.observe import Observed, observe
from modhifi.unlearning.settings import UnlearnSettings
from modhifi.unlearning.sites import Sites, find_sites

BATCH = 250
EDIT, FIT, TEST = 2000, 1000, 2000
DEFAULT = "erase-writers (default: {})"
METHODS: dict[str, UnlearnSettings] = {
    "head-mask (control)": UnlearnSettings(method="head-mask"),
    "hifi-zero, 1 %": UnlearnSettings(method="hifi-zero", strength=0.01),
    "hifi-zero, 3 %": UnlearnSettings(method="hifi-zero", strength=0.03),
    "hifi-negate, 3 %": UnlearnSettings(method="hifi-negate", strength=0.03),
    "contrastive, 3 %": UnlearnSettings(method="contrastive", strength=0.03),
    "projection": UnlearnSettings(method="projection"),
    "gls, 0.3": UnlearnSettings(method="gls", strength=0.3),
    "erase, last block and head": UnlearnSettings(method="erase", depth=1),
    "erase-writers, 1 block, 3 passes": UnlearnSettings(depth=1, passes=3),
    "erase-writers, 2 blocks, 3 passes": UnlearnSettings(depth=2, passes=3),
    "erase-writers, 3 blocks, 1 pass": UnlearnSettings(depth=3, passes=1),
    "erase-writers, 3 blocks, 2 passes": UnlearnSettings(depth=3, passes=2),
    "erase-writers, 4 blocks, 3 passes": UnlearnSettings(depth=4, passes=3),
    "erase-writers, class means not stressed": UnlearnSettings(class_weight=0.0),
    DEFAULT: UnlearnSettings(),
}
COLUMNS = [
    "forget",
    "retain",
    "worst_loss",
    "recall",
    "recall_plain",
    "probe",
    "probe_retain",
    "nearest_mean",
    "neighbours",
    "original_head",
    "relearn",
    "kl",
]


# Of the features of a VGG-11 all but the last two convolutions: with the two layers before the classifier, four blocks.
VGG_STEM = 22
# As many blocks of a residual network at least are in the tail; what edits more is left out.
BLOCKS = 3


class Tail(nn.Module):
    """What follows the stem of a model, under the names it has in the whole model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        whole: Any = copy.deepcopy(model)
        if isinstance(model, timm.models.ResNet):
            parts = {f"layer{n}": getattr(whole, f"layer{n}") for n in range(first_stage(model), 5)}
            parts |= dict(global_pool=whole.global_pool, fc=whole.fc)
        elif isinstance(model, timm.models.VGG):
            parts = dict(features=whole.features[VGG_STEM:], pre_logits=whole.pre_logits, head=whole.head)
        elif isinstance(model, timm.models.SwinTransformer):
            parts = dict(layers=whole.layers[1:], norm=whole.norm, head=whole.head)
        else:
            raise Missing(f"no stem is known for a {type(model).__name__}")
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


def first_stage(model: Any) -> int:
    """The last stage of a ResNet from which on it has enough blocks."""
    blocks = [len(getattr(model, f"layer{n}")) for n in range(1, 5)]
    return max(n for n in range(1, 5) if n == 1 or sum(blocks[n - 1 :]) >= BLOCKS)


def stem(model: Any) -> nn.Module:
    """The part of a model before its tail."""
    if isinstance(model, timm.models.ResNet):
        parts = [model.conv1, model.bn1, model.act1, model.maxpool]
        parts += [getattr(model, f"layer{n}") for n in range(1, first_stage(model))]
    elif isinstance(model, timm.models.VGG):
        parts = [model.features[:VGG_STEM]]
    else:
        parts = [model.patch_embed, model.layers[0]]
    return nn.Sequential(*parts)


@dataclass(frozen=True)
class World:
    """The tail as a model of its own, and what it reads for the images of the three sets."""

    loaded: LoadedModel
    sites: Sites
    edit: Samples
    fit: Samples
    test: Samples
    base: Observed


@torch.no_grad()
def before(model: Any, samples: Samples) -> Samples:
    """The samples as the tail of the network receives them."""
    first = stem(model)
    inputs = torch.cat([first(batch) for batch in samples.batches(BATCH)])
    return replace(samples, load=lambda i: inputs[i])


def world(whole: LoadedModel, edit: Samples, fit: Samples, test: Samples) -> World:
    kept = [before(whole.model, part) for part in (edit, fit, test)]
    tail = load_model(Tail(whole.model), example=torch.stack([kept[0].load(i) for i in range(2)]))
    tail = replace(tail, labels=whole.labels)
    sites = find_sites(tail)
    return World(tail, sites, kept[0], kept[1], kept[2], observe(tail, tail.model, sites, kept[2], BATCH))


def retrained(name: str, own: World, classes: list[int], sets: list[Samples]) -> list[dict[str, Any]]:
    """The measures of the models that were trained without one of the classes, as far as there are any."""
    rows = []
    for index in classes:
        try:
            whole = reference(f"{name}-without-{index}")
        except Missing as reason:
            print(f"not measured: {reason}", flush=True)
            continue
        other = world(whole, *sets)
        found = attack(replace(other, base=own.base), index, other.loaded.model, other.loaded.model)
        rows.append(found | {"original_head": None})
    return rows


def run(own: World, index: int, settings: UnlearnSettings) -> tuple[dict[str, Any], nn.Module, str]:
    """One method on one class: the measures with seconds, the edited model before its norms were settled, depth."""
    groups = populations(own.edit, [index])
    start = time.process_time()
    found = forget(own.loaded, own.sites, own.edit, groups, replace(settings, batch_size=BATCH), [index])
    model = found.model
    if settings.method == "head-mask":
        # The same norms settled as behind an edit of the last three blocks, so that the control stands no worse.
        names = settled_names(own.sites, [w.site.module for w in own.sites.writers][-3:])
        settle_norms(Passes(own.loaded, model, own.edit, BATCH), names, groups == 0)
    seconds = time.process_time() - start
    used = f"{found.values.depth} blocks, {found.values.passes} {'pass' if found.values.passes == 1 else 'passes'}"
    return {**attack(own, index, model, found.plain), "seconds": seconds}, found.plain, used


def attack(own: World, index: int, model: nn.Module, plain: nn.Module | None) -> dict[str, Any]:
    data = UnlearnData(own.edit, populations(own.edit, [index]), own.fit, own.test, ())
    fit, test = (observe(own.loaded, model, own.sites, part, BATCH) for part in (own.fit, own.test))
    head = own.loaded.model.get_submodule(own.sites.heads[0])
    return run_attacks(Attacked(own.loaded, model, plain, fit, test, own.base, head, data, [index], batch_size=BATCH))


def mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every measure over the classes, accuracies in percent."""
    result: dict[str, Any] = {}
    for key in [*COLUMNS, "seconds"]:
        values = [r[key] for r in rows if r.get(key) is not None]
        if values:
            scale = 1 if key in ("kl", "seconds") else 100
            result[key] = scale * sum(values) / len(values)
    return result


def curve(own: World, index: int, plain: nn.Module) -> list[dict[str, Any]]:
    """What a share of the edit does, norms not settled."""
    points = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        part = blend(own.loaded.model, plain, strength)
        points.append({"strength": strength, **attack(own, index, part, part)})
    return points


def plot(name: str, method: str, points: list[dict[str, Any]], honest: dict[str, Any] | None) -> None:
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for key in ("forget", "retain", "recall", "probe", "neighbours"):
        known = [p for p in points if p[key] is not None]
        if known:
            axes.plot([p["strength"] for p in known], [100 * p[key] for p in known], marker="o", label=key)
    if honest is not None:
        axes.axhline(honest["probe"], color="grey", linestyle=":", label="probe, trained without")
    axes.set_xlabel(f"share of the full edit\n{method}")
    axes.set_ylabel("% of test images")
    axes.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def earlier_results(model: str, classes: list[int]) -> dict[str, Any]:
    """The results file of a model, where there is one of the same classes."""
    path = RESULTS / f"unlearn_{model}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("classes") == classes else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet")
    parser.add_argument("--classes", default="0,1,2,3,4,5,6,7,8,9")
    parser.add_argument("--methods", default="", help="names or parts of them, separated by ;: the rest stays as it is")
    chosen = parser.parse_args()
    classes = [int(c) for c in chosen.classes.split(",")]
    whole = reference(chosen.model)
    train = load_samples(f"images:{cifar10() / 'train'}", whole, n=EDIT + FIT)
    test = load_samples(f"images:{cifar10() / 'test'}", whole, n=TEST)
    sets = [train.subset(range(EDIT)), train.subset(range(EDIT, len(train))), test]
    own = world(whole, *sets)
    rows = [{"method": "original", **mean([attack(own, c, own.loaded.model, own.loaded.model) for c in classes])}]
    print(json.dumps(rows[0]), flush=True)
    earlier = earlier_results(chosen.model, classes) if chosen.methods else {}
    details: dict[str, Any] = {}
    edited: dict[str, nn.Module] = {}
    for name, settings in METHODS.items():
        if settings.depth is not None and settings.depth > len(own.sites.writers):
            continue
        if not any(word in name for word in chosen.methods.split(";")):
            known = [r for r in earlier.get("rows", ()) if r["method"].startswith(name.partition("{")[0])]
            rows += known
            details |= {r["method"]: earlier["details"][r["method"]] for r in known}
            continue
        results = [run(own, c, settings) for c in classes]
        name = name.format(results[0][2])
        rows.append({"method": name, **mean([r for r, _, _ in results])})
        details[name] = {str(c): r for c, (r, _, _) in zip(classes, results, strict=True)}
        edited[name] = results[0][1]
        print(json.dumps(rows[-1]), flush=True)
    honest = earlier["retrained"] if earlier else retrained(chosen.model, own, classes, sets)
    if honest:
        rows.append({"method": f"trained without the class ({len(honest)} models)", **mean(honest)})
        print(json.dumps(rows[-1]), flush=True)
    if chosen.methods and not earlier:
        return
    default = next(name for name in details if name.startswith(DEFAULT.partition("{")[0]))
    points = curve(own, classes[0], edited[default]) if default in edited else earlier["curve"]
    intro = f"""# Forgetting a class

Reference model `{chosen.model}`, mean over the classes {chosen.classes}; {EDIT} training images for the edit, {FIT}
others for the attacks, {len(test)} test images. In %, KL in nats, seconds of processor time of the edit (without the
shared first part of the network). `recall`: forgotten class after BatchNorm of the last stages was re-estimated on
retained images; `recall_plain`: the same before the norms were settled. `probe`, `nearest_mean`, `neighbours`,
`relearn` (10-shot prototypes): forgotten class found in the last features.
"""
    columns = ["method", *COLUMNS, "seconds"]
    name = f"unlearn_{chosen.model}"
    write_results(name, rows, columns, intro, classes=classes, details=details, retrained=honest, curve=points)
    plot(name, default, points, rows[-1] if honest else None)


if __name__ == "__main__":
    main()
