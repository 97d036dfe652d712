"""How many drawn images a cut needs, by the widths of what reads them: a narrow ResNet and a VGG of wide readers.

    MODHIFI_DATA=DIR python eval/synthetic_amount.py [--model demo|vgg] [--images 250 1000 4000] [--seeds 1]

DIR holds cifar10.tar.gz. Everything is as `modhifi prune MODEL --flops 0.5x` (or 0.25x) has it, but that what a VGG's
first classifier layer reads stays. Rows that eval/results/synthetic_amount_MODEL.json has are not measured again.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from typing import Any

from common import RESULTS, accuracy, cifar10, reference, write_results
from synthetic import WIDEST

from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.grid import measure_once, order_once, prune_measured
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import find_structure
from modhifi.runs.defaults import rounding_for
from modhifi.structure.operators import columns_of

TEST, BATCH, SHARES = 2000, 50, (0.5, 0.25)
MODELS = {
    "demo": "demo's ResNet (readers of up to 576 columns, which see 64 positions of an image)",
    "vgg": "VGG-11 (readers of up to 4,608 columns, which see 4 positions of an image)",
}
SOURCES = {"drawn": "synthetic", "real training images": "images:{}"}


def accuracies(loaded: LoadedModel, calibration: Samples, test: Samples, settings: PruneSettings) -> dict[str, float]:
    """Top-1 in % by the share of FLOPs that is kept, from one set of moments."""
    measured, curves = order_once(measure_once(loaded, calibration, settings), [settings])
    found = {}
    for share in SHARES:
        model = prune_measured(measured, curves, Budget("macs", share), settings).model
        found[f"FLOPs × {share}"] = accuracy(partial(loaded.logits, model=model), test, BATCH)
    return found


def main(options: argparse.Namespace) -> None:
    loaded, root, name = reference(options.model), cifar10(), f"synthetic_amount_{options.model}"
    test = load_samples(f"images:{root / 'test'}", loaded, n=TEST)
    modules = dict(loaded.model.named_modules())
    wide = tuple(
        group.name
        for group in find_structure(loaded).prunable
        if any(columns_of(modules[piece.module])[1] > WIDEST for piece in group.readers)
    )
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    for source, n, rows_per_column, seed in product(
        options.sources, options.images, options.rows, range(options.seeds)
    ):
        key = {"source": source, "images": n, "rows per column": rows_per_column, "seed": seed}
        if any(key.items() <= row.items() for row in rows):
            continue
        calibration = load_samples(SOURCES[source].format(root / "train"), loaded, n=n, seed=seed)
        settings = PruneSettings(
            rows_per_column=rows_per_column, seed=seed, rounding=rounding_for(loaded, "cpu"), exclude=wide
        )
        rows.append({**key, **accuracies(loaded, calibration, test, settings)})
        print(rows[-1], flush=True)
    rows.sort(key=lambda row: (row["source"], row["images"], row["rows per column"], row["seed"]))
    write_results(
        name,
        rows,
        ["source", "images", "rows per column", "seed", *(f"FLOPs × {share}" for share in SHARES)],
        f"""# How many drawn images a cut needs
The {MODELS[options.model]},
default method, top-1 on {TEST} test images in %. "Rows per column" is `--rows-per-column`: with few images a reader
sees all their positions and may have fewer.
Command: `python eval/synthetic_amount.py --model {options.model}`.""",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--images", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--rows", type=int, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=["drawn"])
    main(parser.parse_args())
