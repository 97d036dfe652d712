"""How many drawn images a cut needs, by the widths of what reads them: a narrow ResNet, a wide VGG, and a ResNet-50.

    MODHIFI_DATA=DIR python eval/synthetic_amount.py [--model demo|vgg|resnet50] [--images 250 1000 4000] [--seeds 1]
        [--methods "one shot" sequential] [--sources drawn inverted "real training images"]

DIR holds cifar10.tar.gz, and for the last resnet50_cifar10. Everything is as `modhifi prune MODEL --flops 0.5x` (or
0.25x) has it, but that what a VGG's first classifier layer reads stays. Rows that the results file has are not measured
again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from common import RESULTS, accuracy, cifar10, data_directory, reference, write_results
from synthetic import WIDEST

from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.grid import measure_once, order_once, prune_measured
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import find_structure
from modhifi.runs.defaults import rounding_for
from modhifi.structure.operators import columns_of

TEST, BATCH, SHARES = 2000, 50, (0.5, 0.25)
# As the paper's ResNet-50 is cut.
PAPERS = (1 / 4.07,)
MODELS = {
    "demo": "demo's ResNet (readers of up to 576 columns, which see 64 positions of an image)",
    "vgg": "VGG-11 (readers of up to 4,608 columns, which see 4 positions of an image)",
    "resnet50": "ResNet-50 (readers of up to 4,608 columns, which see 16 positions of an image)",
}
SOURCES = {"drawn": "synthetic", "inverted": "synthetic:invert", "real training images": "images:{}"}
METHODS = {"one shot": None, "sequential": "dense"}


def shares_of(model: str) -> tuple[float, ...]:
    return PAPERS if model == "resnet50" else SHARES


def column(share: float) -> str:
    return f"FLOPs × {share:.3g}"


def model_of(name: str) -> LoadedModel:
    if name == "resnet50":
        return load_model(data_directory("resnet50_cifar10", "resnet50_cifar10"))
    return reference(name)


def main(options: argparse.Namespace) -> None:
    loaded, root, name = model_of(options.model), cifar10(), f"synthetic_amount_{options.model}"
    test = load_samples(f"images:{root / 'test'}", loaded, n=TEST)
    modules = dict(loaded.model.named_modules())
    wide = tuple(
        group.name
        for group in (find_structure(loaded).prunable if options.model == "vgg" else ())
        if any(columns_of(modules[piece.module])[1] > WIDEST for piece in group.readers)
    )
    dense = accuracy(loaded.logits, test, BATCH)
    path, shares = RESULTS / f"{name}.json", shares_of(options.model)
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    for source, n, per_column, seed in product(options.sources, options.images, options.rows, range(options.seeds)):
        keys = [
            {"source": source, "images": n, "rows per column": per_column, "seed": seed, "method": method}
            for method in options.methods
        ]
        keys = [key for key in keys if not any(key.items() <= row.items() for row in rows)]
        if not keys:
            continue
        calibration = load_samples(SOURCES[source].format(root / "train"), loaded, n=n, seed=seed)
        settings = PruneSettings(
            rows_per_column=per_column, seed=seed, rounding=rounding_for(loaded, "cpu"), exclude=wide
        )
        measured, curves = order_once(measure_once(loaded, calibration, settings), [settings])
        for key in keys:
            chosen, found = replace(settings, sequential=METHODS[str(key["method"])]), {}
            for share in shares:
                model = prune_measured(measured, curves, Budget("macs", share), chosen).model
                found[column(share)] = accuracy(partial(loaded.logits, model=model), test, BATCH)
            rows.append({**key, **found})
            print(rows[-1], flush=True)
            rows.sort(key=lambda row: [row[k] for k in ("source", "images", "rows per column", "seed", "method")])
            write_results(
                name,
                rows,
                ["source", "images", "rows per column", "seed", "method", *map(column, shares)],
                f"""# How many drawn images a cut needs
The {MODELS[options.model]}, top-1 on
{TEST} test images in %, {dense:.1f} before. Rounded widths, `obs` and least squares, in
one shot or reader after reader (the default). "Rows per column" is `--rows-per-column`: with few images a reader sees
all their positions and may have fewer.
Command: `python eval/synthetic_amount.py --model {options.model}`.""",
                dense=dense,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--images", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--rows", type=int, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=["drawn"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    main(parser.parse_args())
