"""The paper's claims about HiFi components (arXiv 2511.19566), tried on a reference network; see docs/reproduce.md.

    MODHIFI_DATA=DIR python eval/reproduce.py [--part existence|noise|removal|samples|constants] [--model demo|resnet]

DIR holds cifar10.tar.gz. Each part takes a few CPU minutes and writes eval/results/reproduce_PART.{json,md,png}; parts
whose data is missing say so. Components are the inner channels of every block; weights are never trained.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from common import RESULTS, Missing, cifar10, reference, write_results
from common import accuracy as top1
from matplotlib.figure import Figure
from torch import Tensor, nn

from modhifi.bounds.ladder import verify_model
from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.elimination import Curve
from modhifi.pruning.fidelity import channel_energy, prefix_fidelity, similarity
from modhifi.pruning.readers import Reader, best_singletons, readers_of
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, measure_moments
from modhifi.structure.clone import clone
from modhifi.structure.expand import expand
from modhifi.structure.plan import Plan

CALIBRATION, TEST, BATCH = 500, 1000, 100
# Not pruned, but ordered to the last component.
SETTINGS = PruneSettings(layout="uniform", coupled=False, floor=1e-9, batch_size=BATCH)
ETAS = (0.5, 0.8, 0.9)
SELECTORS = ("naive", "energy", "obs")
SEEDS = 3
# As in the paper: the share of the components that counts as HiFi, the share that is removed, the noise.
HIFI, REMOVED = 0.2, 0.22
NOISES = [(role, deviation) for role in ("reader", "producer") for deviation in (0.03, 0.1)]
# The largest layer of which every subset is tried, and the numbers that are held at once for that.
ENUMERATED, NUMBERS = 16, 2**24


@dataclass(frozen=True)
class Bench:
    """A reference network, images that calibrate it and images that test it."""

    name: str
    loaded: LoadedModel
    root: str

    @classmethod
    def of(cls, name: str) -> Bench:
        return cls(name, reference(name), str(cifar10()))

    def images(self, part: str, n: int, seed: int = 0) -> Samples:
        """Images of one part of CIFAR-10, read once."""
        samples = load_samples(f"images:{self.root}/{part}", self.loaded, n=n, seed=seed)
        items = [samples.load(i) for i in range(len(samples))]
        return replace(samples, load=items.__getitem__)

    @cached_property
    def structure(self) -> Any:
        return choose_groups(find_structure(self.loaded), SETTINGS)

    @cached_property
    def held(self) -> Samples:
        return self.images("test", TEST)

    @cached_property
    def calibration(self) -> Samples:
        return self.images("train", CALIBRATION)

    @cached_property
    def moments(self) -> dict[str, Moments]:
        return measure_moments(self.loaded, self.structure, self.calibration, SETTINGS.sampling)

    def accuracy(self, model: nn.Module | None = None) -> float:
        """Top-1 on the test images in percent; of the network itself without ``model``."""
        chosen = self.loaded.model if model is None else model

        def logits(batch: Tensor) -> Tensor:
            return self.loaded.logits(batch.contiguous(memory_format=torch.channels_last), chosen)

        return top1(logits, self.held, BATCH)

    def rankings(self, selector: str, moments: Mapping[str, Moments], seed: int = 0) -> dict[str, Tensor]:
        """By group its components from the one to keep longest to the first to go."""
        settings = replace(SETTINGS, selector=selector, seed=seed)
        curves = removal_curves(self.loaded.model, self.structure, moments, settings)
        return {g.name: ranking(curves[g.name], g.n) for g in self.structure.prunable}

    def readers(self, moments: Mapping[str, Moments]) -> dict[str, list[Reader]]:
        return {g.name: readers_of(self.loaded.model, self.structure, g, moments) for g in self.structure.prunable}


def ranking(curve: Curve, n: int) -> Tensor:
    """All components of a curve, the last to go first."""
    stay = torch.ones(n, dtype=torch.bool)
    stay[curve.order] = False
    return torch.cat([torch.nonzero(stay).flatten(), curve.order.flip(0)])


def pooled_fidelity(readers: list[Reader], order: Tensor) -> Tensor:
    """Subset Fidelity, in the paper's scalars, of the first k components, over all output channels, ``(n + 1,)``."""
    (part,) = (part for reader in readers for part in reader.parts)
    energy = channel_energy(part.weight, part.second, part.columns)
    curves = prefix_fidelity(part.weight, part.second, part.columns, order)
    return (curves * energy[:, None]).sum(0) / energy.sum()


def all_subsets(readers: list[Reader], size: int) -> Tensor:
    """Subset Fidelity, over all output channels, of every subset of ``size`` components, ``(subsets,)``."""
    (part,) = (part for reader in readers for part in reader.parts)
    n, columns = len(part.columns), part.columns.reshape(-1)
    second = part.second[columns][:, columns]
    q = torch.stack([similarity(row, second, n) for row in part.weight[:, columns]])
    target, energy = q.sum(2), q.sum()
    # torch.combinations makes all tuples first.
    subsets = torch.tensor(list(itertools.combinations(range(n), size)))
    explained = []
    for members in subsets.split(max(1, NUMBERS // (len(q) * size * size))):
        own = q[:, members[:, :, None], members[:, None, :]]
        towards = target[:, members]
        damping = 1e-10 * own.diagonal(dim1=2, dim2=3).mean(2)[..., None, None] * torch.eye(size, dtype=own.dtype)
        solved = torch.linalg.solve(own + damping, towards)
        explained.append((solved * towards).sum((0, 2)))
    return torch.cat(explained) / energy


def existence(bench: Bench) -> None:
    """How few components reach which fidelity, chosen how; in one layer against every subset there is."""
    readers = bench.readers(bench.moments)
    orders = {selector: bench.rankings(selector, bench.moments) for selector in SELECTORS}
    chance = [bench.rankings("random", bench.moments, seed) for seed in range(SEEDS)]
    curves = {
        name: {
            **{selector: pooled_fidelity(own, orders[selector][name]) for selector in SELECTORS},
            "random": torch.stack([pooled_fidelity(own, order[name]) for order in chance]).mean(0),
        }
        for name, own in readers.items()
    }
    rows = []
    for name, own in curves.items():
        n = len(readers[name][0].owner)
        row: dict[str, Any] = {"layer": name, "components": n}
        for selector, curve in own.items():
            for eta in ETAS:
                row[f"{selector} {eta:g}"] = int((curve < eta).sum()) / n
        rows.append(row)
    small = min(readers, key=lambda name: len(readers[name][0].owner))
    n = len(readers[small][0].owner)
    exact: list[dict[str, Any]] = []
    for k in range(1, n) if n <= ENUMERATED else ():
        values = all_subsets(readers[small], k)
        exact.append(
            {
                "k": k,
                "subsets": len(values),
                "best": float(values.max()),
                "median": float(values.median()),
                "worst": float(values.min()),
                **{selector: float(curve[k]) for selector, curve in curves[small].items()},
            }
        )
    few = {
        selector: sum(row[f"{selector} 0.8"] <= HIFI for row in rows) / len(rows) for selector in (*SELECTORS, "random")
    }

    def draw(left: Any, right: Any) -> None:
        points = torch.linspace(0, 1, 101)
        for selector in ("obs", "naive", "energy", "random"):
            on_grid = [c[selector][(points * (len(c[selector]) - 1)).round().long()] for c in curves.values()]
            left.plot(points, torch.stack(on_grid).mean(0), label=selector)
        left.set(xlabel="share of components kept", ylabel="Subset Fidelity, mean over layers", ylim=(0, 1.02))
        left.legend(frameon=False)
        sizes = [row["k"] for row in exact]
        right.fill_between(
            sizes, [r["worst"] for r in exact], [r["best"] for r in exact], alpha=0.2, label="all subsets", linewidth=0
        )
        for selector in ("obs", "naive", "random"):
            right.plot(sizes, [r[selector] for r in exact], marker=".", label=selector)
        right.plot(sizes, [r["median"] for r in exact], "k:", label="median subset")
        right.set(xlabel=f"k of the {n} components of {small}", ylabel="Subset Fidelity", ylim=(0, 1.02))
        right.legend(frameon=False)

    save(
        bench,
        "existence",
        rows,
        ["layer", "components", *(f"{selector} {eta:g}" for eta in ETAS for selector in (*SELECTORS, "random"))],
        f"""# HiFi sets exist
Share of a layer's components that Subset Fidelity 0.5, 0.8 and 0.9 takes, in the paper's scalars, over all output
channels (weighted by energy), by who chooses; `random` is the mean curve of {SEEDS} orders. In the picture's right half
every subset of {small} was tried.""",
        draw,
        exact=exact,
        few=few,
    )


def disturbed(bench: Bench, chosen: Mapping[str, Tensor], role: str, noise: float, seed: int) -> nn.Module:
    """The network with Gaussian noise on the weights that read some components of every group, or that make them."""
    model = clone(bench.loaded.model)
    generator = torch.Generator().manual_seed(seed)
    for group in bench.structure.prunable:
        for piece in group.of(role):
            weight = model.get_submodule(piece.module).weight.data
            own = weight.movedim(1, 0) if role == "reader" else weight
            places = piece.index[chosen[group.name]].flatten()
            own[places] += noise * torch.randn(own[places].shape, generator=generator)
    return model


def sides(rankings: Mapping[str, Tensor], share: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first ``share`` of every ranking, and the rest."""
    counts = {name: max(1, round(share * len(order))) for name, order in rankings.items()}
    return (
        {name: order[: counts[name]] for name, order in rankings.items()},
        {name: order[counts[name] :] for name, order in rankings.items()},
    )


def noise(bench: Bench) -> None:
    """What noise on the HiFi components does, and what noise on all others does."""
    dense, scale = bench.accuracy(), weight_scale(bench)
    targets: dict[str, dict[str, Tensor]] = {}
    for selector in ("naive", "obs"):
        hifi, rest = sides(bench.rankings(selector, bench.moments), HIFI)
        least = {name: order[-len(hifi[name]) :] for name, order in rest.items()}
        targets |= {
            f"{HIFI:.0%} HiFi by {selector}": hifi,
            f"the other {1 - HIFI:.0%} by {selector}": rest,
            f"the least {HIFI:.0%} by {selector}": least,
        }
    targets[f"{HIFI:.0%} at random"] = sides(bench.rankings("random", bench.moments), HIFI)[0]
    rows = []
    for name, chosen in targets.items():
        row: dict[str, Any] = {"noise on": name}
        for role, deviation in NOISES:
            values = [bench.accuracy(disturbed(bench, chosen, role, deviation, seed)) for seed in range(SEEDS)]
            row[f"{role}, {deviation:g}"] = statistics.mean(values) - dense
        rows.append(row)
        print(row, flush=True)
    save(
        bench,
        "noise",
        rows,
        ["noise on", *(f"{role}, {deviation:g}" for role, deviation in NOISES)],
        f"""# Noise on HiFi components and on all others
Points of top-1 accuracy (dense {dense:.1f} %) that Gaussian noise costs, in every layer at once, on the weights which
read the components (`reader`) or make them (`producer`), by its standard deviation; mean of {SEEDS} seeds. The weights
that read have a root mean square of {scale:.3f}.""",
        lambda left, right: bars(left, right, rows, ["reader, 0.1", "producer, 0.1"], "noise on", "points of top-1"),
        dense=dense,
        weights=scale,
    )


def weight_scale(bench: Bench) -> float:
    """The root mean square of the weights that read the components."""
    weights = torch.cat(
        [
            bench.loaded.model.get_submodule(piece.module).weight.detach()[:, piece.index.flatten()].flatten()
            for group in bench.structure.prunable
            for piece in group.readers
        ]
    )
    return float(weights.square().mean().sqrt())


def removal(bench: Bench) -> None:
    """What the removal of HiFi, other and random components does, without and with compensation."""
    dense = bench.accuracy()
    removed: dict[str, list[dict[str, Tensor]]] = {}
    for selector in ("naive", "obs"):
        rankings = bench.rankings(selector, bench.moments)
        backwards = {name: order.flip(0) for name, order in rankings.items()}
        removed[f"HiFi by {selector}"] = [sides(rankings, REMOVED)[0]]
        removed[f"the least by {selector}"] = [sides(backwards, REMOVED)[0]]
    removed["at random"] = [sides(bench.rankings("random", bench.moments, seed), REMOVED)[0] for seed in range(SEEDS)]
    rows = []
    for name, choices in removed.items():
        row: dict[str, Any] = {"removed": name}
        for compensate in ("none", "delta", "lstsq"):
            settings = replace(SETTINGS, compensate=compensate)
            values = []
            for chosen in choices:
                kept = {
                    g.name: tuple(sorted({*range(g.n)} - {*chosen[g.name].tolist()})) for g in bench.structure.prunable
                }
                pruned = apply_plan(bench.loaded, bench.structure, Plan(kept), bench.moments, settings)
                values.append(bench.accuracy(pruned.model))
            row[compensate] = statistics.mean(values) - dense
        rows.append(row)
        print(row, flush=True)
    save(
        bench,
        "removal",
        rows,
        ["removed", "none", "delta", "lstsq"],
        f"""# Removal of HiFi, other and random components
Points of top-1 accuracy (dense {dense:.1f} %) that the removal of {REMOVED:.0%} of every layer's components costs,
without compensation, with the paper's scalars, and with least squares; `at random` is the mean of {SEEDS} seeds.""",
        lambda left, right: bars(left, right, rows, ["none", "lstsq"], "removed", "points of top-1"),
        dense=dense,
    )


def bars(left: Any, right: Any, rows: list[dict[str, Any]], keys: list[str], name: str, label: str) -> None:
    """Two bar charts of two columns of the rows."""
    for axes, key in zip((left, right), keys, strict=True):
        axes.barh(range(len(rows)), [row[key] for row in rows], color="#3b8ede")
        axes.set_yticks(range(len(rows)), [row[name] for row in rows])
        axes.invert_yaxis()
        axes.set(xlabel=label, title=key)


def samples(bench: Bench) -> None:
    """How much scores and HiFi sets move with the number of calibration images."""
    amounts = (25, 50, 100, 200, 500, 1000)

    def measured(n: int, seed: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        moments = measure_moments(bench.loaded, bench.structure, bench.images("train", n, seed), SETTINGS.sampling)
        readers = bench.readers(moments)
        singles = {name: best_singletons(own, len(own[0].owner)) for name, own in readers.items()}
        return singles, {selector: sides(bench.rankings(selector, moments), HIFI)[0] for selector in SELECTORS}

    # Other images than those it is compared with, but for chance.
    singles, sets = measured(2000, SEEDS)
    rows = []
    for n in amounts:
        row: dict[str, Any] = {"samples": n}
        seeds = [measured(n, seed) for seed in range(SEEDS if n <= 200 else 1)]
        row["rank correlation"] = statistics.mean(
            correlation(own[name], singles[name]) for own, _ in seeds for name in singles
        )
        for selector in SELECTORS:
            row[selector] = statistics.mean(
                len({*own[selector][name].tolist()} & {*chosen.tolist()}) / len(chosen)
                for _, own in seeds
                for name, chosen in sets[selector].items()
            )
        rows.append(row)
        print(row, flush=True)

    def draw(left: Any, right: Any) -> None:
        left.plot(amounts, [row["rank correlation"] for row in rows], marker=".")
        for selector in SELECTORS:
            right.plot(amounts, [row[selector] for row in rows], marker=".", label=selector)
        for axes, label in ((left, "rank correlation of singletons"), (right, "overlap of HiFi sets")):
            axes.set(xscale="log", xlabel="calibration images", ylabel=label, ylim=(0, 1.02))
        right.legend(frameon=False)

    save(
        bench,
        "samples",
        rows,
        ["samples", "rank correlation", *SELECTORS],
        f"""# Stability in samples
Against 2000 training images of another seed: Spearman's correlation of the singleton fidelities, and the share that the
{HIFI:.0%} of each layer's components which go last have in common, by selector; mean over layers and {SEEDS} seeds (one
from 500 images on).""",
        draw,
    )


def correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation; ties by number."""
    ranks = torch.stack([values.argsort(stable=True).argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def constants(bench: Bench) -> None:
    """The constants of the error bound against the ratios that are measured."""
    rows = []
    rankings = bench.rankings("obs", bench.moments)
    for ratio in (0.1, 0.25, 0.5):
        kept = {name: tuple(sorted(chosen.tolist())) for name, chosen in sides(rankings, 1 - ratio)[0].items()}
        pruned = apply_plan(bench.loaded, bench.structure, Plan(kept), bench.moments, SETTINGS)
        dense_shape = expand(pruned.model, bench.loaded.model, pruned.structure, pruned.plan)
        report = verify_model(bench.loaded, pruned.model, dense_shape, bench.held.subset(range(64)), walked=16)
        for layer in report.layers:
            rows.append(
                {
                    "removed": ratio,
                    "layer": layer.where,
                    "worst case": None if layer.constant is None else layer.constant**2,
                    "measured": layer.amplification**2,
                }
            )
    known = [row for row in rows if row["worst case"] is not None]

    def draw(left: Any, right: Any) -> None:
        for axes, key in ((left, "worst case"), (right, "measured")):
            for ratio in (0.1, 0.25, 0.5):
                own = [row for row in known if row["removed"] == ratio]
                axes.plot([row[key] for row in own], marker=".", label=f"{ratio:.0%} removed")
            axes.set(yscale="log", xlabel="modified layer, from input to output", ylabel=f"{key}, squared errors")
            axes.legend(frameon=False)

    save(
        bench,
        "constants",
        rows,
        ["removed", "layer", "worst case", "measured"],
        """# Constants of the bound against measured ratios
Squared change of the output over a layer's own squared error: at worst, by the product of Lipschitz constants behind
the layer (R1), and as measured on 16 images when that layer alone is undone (R4).""",
        draw,
        range={key: [f(row[key] for row in known) for f in (min, max)] for key in ("worst case", "measured")},
    )


def save(
    bench: Bench,
    part: str,
    rows: list[dict[str, Any]],
    columns: list[str],
    intro: str,
    draw: Callable[[Any, Any], None],
    **more: Any,
) -> None:
    """Writes the table, the figures and the picture of a part."""
    name = f"reproduce_{part}" + ("" if bench.name == "demo" else f"_{bench.name}")
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    draw(*figure.subplots(1, 2))
    figure.savefig(RESULTS / f"{name}.png", dpi=100)
    option = "" if bench.name == "demo" else f" --model {bench.name}"
    write_results(
        name,
        rows,
        columns,
        f"""{intro}
The {bench.name} network, {CALIBRATION} unlabelled CIFAR-10 training images, {TEST} test images, inner channels of every
block. ![plot]({name}.png)
Command: `python eval/reproduce.py --part {part}{option}`.""",
        minutes=round(time.process_time() / 60, 1),
        **more,
    )


PARTS = {"existence": existence, "noise": noise, "removal": removal, "samples": samples, "constants": constants}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--model", choices=("demo", "resnet"), default="demo")
    wanted = parser.parse_args()
    for part in [wanted.part] if wanted.part else PARTS:
        try:
            PARTS[part](Bench.of(wanted.model))
        except Missing as missing:
            print(f"{part}: not run: {missing}")
