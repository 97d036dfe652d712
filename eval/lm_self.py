"""Text that SmolLM2-135M writes itself as calibration, next to real text of two kinds, at equal tokens.

    MODHIFI_DATA=DIR python eval/lm_self.py [--windows N] [--cache DIR]

Data and model as for eval/lm_prune.py; the text of another kind is the reference that every Python carries
(``pydoc_data.topics``). Every edited model is measured on both. Rows that eval/results/lm_self.json has are not
measured again. "self" is here what the model writes from its own beginning alone; eval/lm_kinds.py has all kinds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data import topics
from tempfile import TemporaryDirectory

from lm_prune import HELD, SETTINGS, WINDOW, Table, cached, smollm2, wikitext
from lm_texts import one_kind
from torch import nn

from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments
from modhifi.structure.groups import Structure

RATIOS = (0.05, 0.1, 0.2)
# Windows of the domain beside windows that the model writes.
FEW = 4


def manual(loaded: LoadedModel, windows: int) -> tuple[Samples, Samples]:
    """Real text that has nothing to do with an encyclopaedia: calibration and held-out windows of different topics."""
    with TemporaryDirectory() as folder:
        for name, text in topics.topics.items():
            (Path(folder) / f"{name}.txt").write_text(text, encoding="utf-8")
        return load_samples(f"text:{folder}", loaded, n=windows + HELD, window=WINDOW).split(windows, HELD)


def joined(first: Samples, second: Samples) -> Samples:
    return replace(
        first,
        load=lambda i: first.load(i) if i < len(first) else second.load(i - len(first)),
        hashes=first.hashes + second.hashes,
        names=first.names + second.names,
        units=None,
    )


def edited(
    loaded: LoadedModel, structure: Structure, moments: Callable[[], dict[str, Moments]], ratio: float
) -> nn.Module:
    found = moments()
    curves = removal_curves(loaded.model, structure, found, SETTINGS)
    plan = make_plan(loaded.model, structure, curves, Budget("components", 1 - ratio), SETTINGS)
    return apply_plan(loaded, structure, plan, found, SETTINGS).model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=64, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--cache", type=Path, help="keep moments here, and go on from them")
    options = parser.parse_args()
    loaded, n = smollm2(), options.windows
    domain, held = wikitext(loaded, n)
    reference, held_reference = manual(loaded, n)
    structure = choose_groups(find_structure(loaded), SETTINGS)
    table = Table(
        "lm_self",
        loaded,
        held,
        ["FFN removed", "calibration"],
        f"""# What calibration text costs: SmolLM2-135M, uniform layout, no training
{n * WINDOW} tokens calibrate; perplexity, and over the dense model's, on articles of WikiText-2 that calibrate nothing,
and over the dense model's on topics of Python's reference that calibrate nothing.
WikiText is of a kind of its own (blanks around punctuation, `<unk>`), which no model writes.
Command: `python eval/lm_self.py --windows {n}`.""",
        **{"on Python's reference": held_reference},
    )
    table.add(lambda: loaded.model, **{"FFN removed": 0.0, "calibration": "(dense)"})

    def written(windows: int) -> Samples:
        return one_kind(loaded, windows, WINDOW)

    calibrations: dict[str, Callable[[], Samples]] = {
        "WikiText-2, other articles": lambda: domain,
        "self": lambda: written(n),
        f"self, {FEW} of {n} windows of WikiText-2": lambda: joined(written(n - FEW), domain.subset(range(FEW))),
        "Python's reference, other topics": lambda: reference,
    }
    for name, source in calibrations.items():
        path = options.cache and options.cache / f"{name.split(',')[0].split(':')[0]}-{len(name)}-{n}.pt"

        def moments(source: Callable[[], Samples] = source, path: Path | None = path) -> dict[str, Moments]:
            return cached(path, lambda: measure_moments(loaded, structure, source(), SETTINGS.sampling))  # type: ignore[no-any-return]

        for ratio in RATIOS:
            table.add(partial(edited, loaded, structure, moments, ratio), **{"FFN removed": ratio, "calibration": name})
