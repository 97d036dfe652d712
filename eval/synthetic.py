"""What calibration without data costs: sources of images against the accuracy of what is pruned or unlearned with them.

MODHIFI_DATA=DIR python eval/synthetic.py [--part prune|unlearn|samples|imagenet] [--model demo|resnet|vgg|swin]
[--seeds 3]

``--model`` concerns all parts but imagenet; ``--sources`` takes names of rows, or parts of them, for a smaller table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import RESULTS, Missing, cifar10, efficientnet_lite0, imagenet_sample, reference, write_results
from common import accuracy as top1
from matplotlib.figure import Figure
from torch.nn.modules.batchnorm import _BatchNorm
from unlearn import BATCH

from modhifi.data.labels import label_samples, populations
from modhifi.data.quality import look
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments
from modhifi.structure.operators import columns_of
from modhifi.unlearning.data import FEWEST
from modhifi.unlearning.edit import forget
from modhifi.unlearning.settings import UnlearnSettings
from modhifi.unlearning.sites import find_sites

RATIOS = (0.25, 0.5)
CALIBRATION, TEST = 500, 2000
WIDEST = 8192
FORGOTTEN = (0, 3, 6)


def cached(samples: Samples) -> Samples:
    items = [samples.load(i) for i in range(len(samples))]
    return replace(samples, load=items.__getitem__)


def plainly(samples: Samples) -> Samples:
    """The same images, treated as if they were real: BatchNorm keeps its stored statistics."""
    return replace(samples, synthetic=False)


def as_drawn(samples: Samples) -> Samples:
    """Real images, treated as if they were synthetic: BatchNorm normalises by the batch."""
    return replace(samples, synthetic=True)


def sources(loaded: LoadedModel, real: Callable[[int, int], Samples], n: int) -> dict[str, Callable[[int], Samples]]:
    """By name, what gives ``n`` calibration samples for a seed."""

    remembers = any(isinstance(m, _BatchNorm) for m in loaded.model.modules())

    def drawn(spec: str) -> Callable[[int], Samples]:
        return lambda seed: load_samples(spec, loaded, n=n, seed=seed)

    return {
        "real training images": lambda seed: real(n, seed),
        **({"real, treated like synthetic": lambda seed: as_drawn(real(n, seed))} if remembers else {}),
        "synthetic:invert": drawn("synthetic:invert"),
        "synthetic": drawn("synthetic"),
        **({"Gaussian noise, batch statistics": drawn("synthetic:gaussian")} if remembers else {}),
        "Gaussian noise": lambda seed: plainly(load_samples("synthetic:gaussian", loaded, n=n, seed=seed)),
        "uniform noise": lambda seed: plainly(load_samples("synthetic:uniform", loaded, n=n, seed=seed)),
    }


def accuracy(loaded: LoadedModel, model: torch.nn.Module, test: Samples) -> float:
    def run(batch: torch.Tensor) -> torch.Tensor:
        return loaded.logits(batch.contiguous(memory_format=torch.channels_last), model)  # twice as fast on a CPU

    return top1(run, test, BATCH)


def pruned_accuracies(loaded: LoadedModel, calibration: Samples, test: Samples) -> list[float]:
    """Accuracy after pruning the inner channels of every block at each of ``RATIOS``, from one set of moments.

    A network without such channels, a transformer, loses neurons of its feed-forward layers. What a VGG's first
    classifier layer reads stays: its Gram has 25,088 columns.
    """
    structure = find_structure(loaded)
    inner = any(g.kind == "channels" and not g.coupled for g in structure.prunable)
    wide = tuple(
        g.name
        for g in structure.prunable
        if any(columns_of(loaded.model.get_submodule(s.module))[1] > WIDEST for s in g.readers)
    )
    settings = PruneSettings(layout="uniform", coupled=False, only=("channels" if inner else "neurons",), exclude=wide)
    structure = choose_groups(structure, settings)
    moments = measure_moments(loaded, structure, calibration, settings.sampling)
    curves = removal_curves(loaded.model, structure, moments, settings)
    found = []
    for ratio in RATIOS:
        plan = make_plan(loaded.model, structure, curves, Budget("components", 1 - ratio), settings)
        found.append(accuracy(loaded, apply_plan(loaded, structure, plan, moments, settings).model, test))
    return found


def spread(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.mean(found):.2f}" + (f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else "")


def chosen(found: dict[str, Any], wanted: str) -> dict[str, Any]:
    """Those with one of the ``wanted`` names or parts of names (separated by ``;``), all for none.

    A word that is the whole name of one source means that one alone.
    """
    words = [word.strip() for word in wanted.split(";")]
    return {
        name: source
        for name, source in found.items()
        if any(word == name or (word in name and word not in found) for word in words)
    }


def earlier_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an earlier run that a run with ``--sources`` leaves as they are, each with its number of seeds."""
    path = RESULTS / f"{results_name(options)}.json"
    if not options.sources or not path.is_file():
        return []
    earlier = json.loads(path.read_text())
    return [{"seeds": earlier["seeds"], **row} for row in earlier["rows"]]


def table(
    loaded: LoadedModel, real: Callable[[int, int], Samples], test: Samples, n: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each source, best first; those not asked for stay as the results file has them."""
    everything, rows = sources(loaded, real, n), earlier_rows(options)
    for name, source in chosen(everything, options.sources).items():
        rows = [row for row in rows if row["source"] != name]
        results, gaps = [], []
        for seed in range(options.seeds):
            calibration = cached(source(seed))
            results.append(pruned_accuracies(loaded, calibration, test))
            gaps += [seen["mean_norm_gap"]] if "mean_norm_gap" in (seen := look(loaded, calibration, BATCH)) else []
            print(name, seed, results[-1], gaps[-1:], flush=True)
        means = [statistics.mean(r[k] for r in results) for k in range(len(RATIOS))]
        rows.append({"source": name, "seeds": options.seeds, "means": means})
        if gaps:
            rows[-1]["distance to the norms"] = spread(gaps)
        for k, ratio in enumerate(RATIOS):
            rows[-1][f"{ratio:.0%} removed"] = spread(r[k] for r in results)
    rows.sort(key=lambda row: list(everything).index(row["source"]))
    best, worst = rows[0]["means"], next((r["means"] for r in rows if r["source"] == "Gaussian noise"), None)
    for row in rows if worst else ():
        for k, ratio in enumerate(RATIOS):
            row[f"of the gap, {ratio:.0%}"] = 100 * (row["means"][k] - worst[k]) / (best[k] - worst[k])
    return rows


def plot(rows: list[dict[str, Any]], name: str) -> bool:
    """Quality of data, as told without labels, against the accuracy of what is pruned with it; whether there is any."""
    known = [row for row in rows if "distance to the norms" in row]
    if not known:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    distances = [float(row["distance to the norms"].split()[0]) for row in known]
    for k, ratio in enumerate(RATIOS):
        axes.scatter(distances, [row["means"][k] for row in known], label=f"{ratio:.0%} removed")
    for row, distance in zip(known, distances, strict=True):
        axes.annotate(
            row["source"], (distance, row["means"][0]), (4, 2), textcoords="offset points", fontsize=7, rotation=12
        )
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_xlabel("distance to the moments that BatchNorm stores")
    axes.set_ylabel("% of test images")
    axes.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    return True


def columns(rows: list[dict[str, Any]]) -> list[str]:
    seeds = ["seeds"] if len({row["seeds"] for row in rows}) > 1 else []
    shares = [f"{r:.0%} removed" for r in RATIOS] + [f"of the gap, {r:.0%}" for r in RATIOS]
    return [c for c in ("source", *seeds, *shares, "distance to the norms") if c in rows[0]]


def described(options: argparse.Namespace, seeds: int) -> str:
    """The command line behind a table, without what was left at its default."""
    words = [f"--part {options.part}", f"--seeds {seeds}"]
    words += [f"--model {options.model}"] if options.model != "resnet" else []
    return "Command: `python eval/synthetic.py " + " ".join(words) + "`."


def most_seeds(rows: list[dict[str, Any]]) -> int:
    return max(row["seeds"] for row in rows)


def results_name(options: argparse.Namespace) -> str:
    return f"synthetic_{options.part}" + ("" if options.part == "imagenet" else f"_{options.model}")


def prune(options: argparse.Namespace) -> None:
    loaded, root = reference(options.model), cifar10()
    test = cached(load_samples(f"images:{root / 'test'}", loaded, n=TEST))

    def real(n: int, seed: int) -> Samples:
        return load_samples(f"images:{root / 'train'}", loaded, n=n, seed=seed)

    rows = table(loaded, real, test, CALIBRATION, options)
    picture = f"![plot]({results_name(options)}.png)\n" if plot(rows, results_name(options)) else ""
    write_results(
        results_name(options),
        rows,
        columns(rows),
        f"""# Calibration without data: pruning
The reference {options.model} ({accuracy(loaded, loaded.model, test):.1f} % on {TEST} CIFAR-10 test images); inner
channels (neurons, in a transformer) of every block, `obs` and least squares, {CALIBRATION} calibration images,
{most_seeds(rows)} seeds (mean ± standard deviation, in %).
"Of the gap": from Gaussian noise (0) to real images (100). "Distance to the norms": of the images' moments to those
that BatchNorm stores, before it is told to normalise by the batch: the quality of the data, measured without labels.
{picture}{described(options, most_seeds(rows))}""",
        seeds=most_seeds(rows),
    )


def samples(options: argparse.Namespace) -> None:
    loaded, root = reference(options.model), cifar10()
    test = cached(load_samples(f"images:{root / 'test'}", loaded, n=TEST))
    rows: list[dict[str, Any]] = []
    for n in (50, 200, 1000, 5000):
        for name, spec in (("real training images", f"images:{root / 'train'}"), ("synthetic", "synthetic")):
            found = [
                pruned_accuracies(loaded, load_samples(spec, loaded, n=n, seed=seed), test)
                for seed in range(options.seeds if n < 5000 else 1)
            ]
            rows.append({"source": name, "samples": n})
            for k, ratio in enumerate(RATIOS):
                rows[-1][f"{ratio:.0%} removed"] = spread(r[k] for r in found)
            print(rows[-1], flush=True)
    write_results(
        results_name(options),
        rows,
        ["source", "samples", *(f"{r:.0%} removed" for r in RATIOS)],
        f"""# How many calibration images
As in [pruning without data](synthetic_prune_{options.model}.md), by number of images
({options.seeds} seeds, one for 5,000).
{described(options, options.seeds)}""",
    )


def imagenet(options: argparse.Namespace) -> None:
    loaded = efficientnet_lite0()
    images = load_samples(f"images:{imagenet_sample()}", loaded, n=500)
    test = cached(images.subset(range(250, 500)))

    def real(n: int, seed: int) -> Samples:
        order = torch.randperm(250, generator=torch.Generator().manual_seed(seed))
        return images.subset(order[:n])

    rows = table(loaded, real, test, 125, options)
    write_results(
        "synthetic_imagenet",
        rows,
        columns(rows),
        f"""# Calibration without data: tf_efficientnet_lite0
ImageNet weights ({accuracy(loaded, loaded.model, test):.1f} % on 250 samples that nothing else saw: one standard
error is about 2 points); inner channels of every block, 125 calibration images (real ones from the
other 250 samples), {most_seeds(rows)} seeds (mean ± standard deviation) where no other number stands
(`--sources NAME --seeds N`).
{described(options, most_seeds(rows))}""",
        seeds=most_seeds(rows),
    )


def unlearn(options: argparse.Namespace) -> None:
    loaded, root = reference(options.model), cifar10()
    test = cached(load_samples(f"images:{root / 'test'}", loaded, n=TEST))
    sites = find_sites(loaded)
    assert test.labels is not None

    def accuracies(model: torch.nn.Module, index: int) -> tuple[float, float]:
        with torch.no_grad():
            right = torch.cat([loaded.logits(b, model).argmax(1) for b in test.batches(BATCH)]) == test.labels
        mine = test.labels == index
        return 100 * float(right[mine].double().mean()), 100 * float(right[~mine].double().mean())

    def labelled(found: Samples) -> Samples:
        """As `modhifi unlearn` takes them: by the model where it is sure; inverted ones by what they were drawn for."""
        return label_samples(loaded, cached(found), BATCH)[0]

    def noise(kind: str, seed: int) -> Samples:
        return plainly(load_samples(f"synthetic:{kind}", loaded, n=1000, seed=seed))

    dense = {index: accuracies(loaded.model, index) for index in FORGOTTEN}
    plain = {"source": "not edited", "seeds": options.seeds, **_pair(list(dense.values()))}
    rows = earlier_rows(options) or [plain]
    data_of: dict[str, Callable[[int], Samples]] = {
        "real training images": lambda seed: load_samples(f"images:{root / 'train'}", loaded, n=1000, seed=seed),
        "synthetic:invert": lambda seed: load_samples("synthetic:invert", loaded, n=500, seed=seed),
        "synthetic, labelled by the model": lambda seed: load_samples("synthetic", loaded, n=1000, seed=seed),
        **{f"{kind} noise, labelled by the model": partial(noise, kind.lower()) for kind in ("Gaussian", "uniform")},
    }
    for name, source in chosen(data_of, options.sources).items():
        rows = [row for row in rows if row["source"] != name]
        found, edits = [], 0
        for seed in range(options.seeds):
            data = labelled(source(seed))
            for index in FORGOTTEN:
                groups = populations(data, [index])
                if min(int((groups == part).sum()) for part in (0, 1)) < FEWEST:
                    found.append(dense[index])  # what `modhifi unlearn` refuses: the model stays as it is
                else:
                    edited = forget(loaded, sites, data, groups, UnlearnSettings(batch_size=BATCH), [index]).model
                    found.append(accuracies(edited, index))
                    edits += 1
                print(name, seed, index, found[-1], flush=True)
        rows.append({"source": name, "seeds": options.seeds, "edits": f"{edits} of {len(found)}", **_pair(found)})
    rows.sort(key=lambda row: ["not edited", *data_of].index(row["source"]))
    write_results(
        results_name(options),
        rows,
        ["source", "edits", "forgotten class", "other classes"],
        f"""# Forgetting without data
`erase-writers` on the reference {options.model}, classes {FORGOTTEN} one by one, {most_seeds(rows)} seeds; accuracy on
{TEST} CIFAR-10 test images in %, mean ± standard deviation over classes and seeds. "Edits": where the model sees a
class in fewer than {FEWEST} samples of a source, `modhifi unlearn` refuses and the model counts as it is.
{described(options, most_seeds(rows))}""",
        seeds=most_seeds(rows),
    )


def _pair(found: list[tuple[float, float]]) -> dict[str, str]:
    return {"forgotten class": spread(a for a, _ in found), "other classes": spread(b for _, b in found)}


PARTS = {"prune": prune, "unlearn": unlearn, "samples": samples, "imagenet": imagenet}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--model", choices=("demo", "resnet", "vgg", "swin"), default="resnet")
    parser.add_argument("--sources", default="", help="names of sources or parts of them, separated by ;")
    parser.add_argument("--seeds", type=int, default=3)
    wanted = parser.parse_args()
    for part in [wanted.part] if wanted.part else PARTS:
        try:
            PARTS[part](argparse.Namespace(**{**vars(wanted), "part": part}))
        except Missing as missing:
            print(f"{part}: not run: {missing}")
