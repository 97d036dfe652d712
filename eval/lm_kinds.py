"""What a cut of SmolLM2-135M costs on every kind of text, by what calibrated it and how: the worst beside the mean.

    MODHIFI_DATA=DIR python eval/lm_kinds.py [--windows N] [--window TOKENS] [--cache DIR] [--only NAME ...]

Data and model as for eval/lm_prune.py; the model runs in bfloat16. Rows that eval/results/lm_kinds.json has are not
measured again; with --cache windows and moments are kept, and a run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_results
from lm_prune import SETTINGS, cached, smollm2
from lm_texts import KINDS, Judge, one_kind, stacked
from torch import Tensor, nn

from modhifi.calibration.moments import Moments, combined
from modhifi.data.in_memory import from_items
from modhifi.data.samples import Samples
from modhifi.data.self_generated import write
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.sensitivity import probed_plan
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments

RATIO, HELD, ONE, DEFAULT = 0.2, 4, "self, one kind", 64
WIKI, MANUAL, CODE = list(KINDS)[:3]
# By name the share of every source, and what else is not as in `SETTINGS`.
CALIBRATIONS: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    ONE: ({ONE: 1}, {}),
    "self": ({"self": 1}, {}),
    f"self, 10 % {WIKI}": ({"self": 0.9, WIKI: 0.1}, {}),
    f"self, 10 % {MANUAL}": ({"self": 0.9, MANUAL: 0.1}, {}),
    "self, --layout global": ({"self": 1}, {"layout": "global"}),
    f"self, 10 % {WIKI}, --layout global": ({"self": 0.9, WIKI: 0.1}, {"layout": "global"}),
    f"self, 10 % {MANUAL}, --layout global": ({"self": 0.9, MANUAL: 0.1}, {"layout": "global"}),
    f"self, 50 % {WIKI}": ({"self": 0.5, WIKI: 0.5}, {}),
    f"thirds of self, {WIKI} and {MANUAL}": ({"self": 1 / 3, WIKI: 1 / 3, MANUAL: 1 / 3}, {}),
    WIKI: ({WIKI: 1}, {}),
    "self, ridge 1e-3": ({"self": 1}, {"ridge": 1e-3}),
    "self, ridge 1e-2": ({"self": 1}, {"ridge": 1e-2}),
    f"self, 10 % {WIKI}, ridge 1e-2": ({"self": 0.9, WIKI: 0.1}, {"ridge": 1e-2}),
    "self, sequential towards the dense outputs": ({"self": 1}, {"sequential": "dense"}),
    "self, sequential towards the layer's own": ({"self": 1}, {"sequential": "own"}),
    "self, Wanda's order + δ (the paper's)": ({"self": 1}, {"selector": "wanda", "compensate": "delta"}),
    "self, Wanda's order, no compensation": ({"self": 1}, {"selector": "wanda", "compensate": "none"}),
}


class Bench:
    """The model, the moments of every source, and held-out windows of every kind."""

    def __init__(self, windows: int, window: int, cache: Path | None) -> None:
        self.loaded, self.windows, self.window, self.cache = smollm2(), windows, window, cache
        self.structure = choose_groups(find_structure(self.loaded), SETTINGS)
        self.loaded.model.to(torch.bfloat16)
        self.judge = Judge(self.loaded, {kind: self.split(kind)[1] for kind in KINDS}, self.kept)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        return cached(self.cache and self.cache / f"{name}-{self.windows}-{self.window}.pt", make)

    def split(self, kind: str) -> tuple[Tensor, Tensor]:
        """Windows of a kind that may calibrate, if it is one that does, and others of other documents that never do."""

        def both() -> tuple[Tensor, Tensor]:
            if kind not in (WIKI, MANUAL):
                return torch.empty(0), stacked(KINDS[kind](self.loaded, HELD, self.window))
            all_of_it = KINDS[kind](self.loaded, self.windows + HELD, self.window)
            calibration, held = all_of_it.split(len(all_of_it) - HELD, HELD)
            return stacked(calibration), stacked(held)

        return self.kept(kind, both)  # type: ignore[no-any-return]

    def written(self, source: str) -> Tensor:
        """Windows that the model writes, in float32, from one kind of beginning or from all."""
        if source == "self":
            return stacked(write(smollm2(), self.windows, window=self.window))
        return stacked(one_kind(smollm2(), self.windows, self.window))

    def samples(self, source: str) -> Samples:
        own = source in ("self", ONE)
        tokens = self.kept(f"written {source}", lambda: self.written(source)) if own else self.split(source)[0]
        return from_items(list(tokens), None, n=len(tokens), seed=0)

    def moments(self, source: str) -> dict[str, Moments]:
        return self.kept(  # type: ignore[no-any-return]
            f"moments {source}",
            lambda: measure_moments(self.loaded, self.structure, self.samples(source), SETTINGS.sampling),
        )

    def edited(self, shares: dict[str, float], changes: dict[str, Any]) -> nn.Module:
        settings = replace(SETTINGS, **changes)
        moments = combined([(share, self.moments(source)) for source, share in shares.items()])
        budget, samples = Budget("components", 1 - RATIO), self.samples(next(iter(shares)))
        if settings.layout == "global":
            curves = removal_curves(self.loaded.model, self.structure, moments, settings)
            plan = probed_plan(self.loaded, self.structure, curves, moments, samples, budget, settings).plan
        else:
            widths = {g.name: math.ceil((1 - RATIO) * g.n) for g in self.structure.prunable}
            curves = removal_curves(self.loaded.model, self.structure, moments, settings, widths=widths)
            plan = make_plan(self.loaded.model, self.structure, curves, budget, settings)
        used = samples if settings.sequential else None
        return apply_plan(self.loaded, self.structure, plan, moments, settings, used).model


def main(options: argparse.Namespace) -> None:
    settings = {"windows": options.windows, "window": options.window}
    name_of_results = "lm_kinds" if options.windows == DEFAULT else f"lm_kinds_{options.windows}"
    path = RESULTS / f"{name_of_results}.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[dict[str, Any]] = earlier["rows"] if earlier.get("settings") == settings else []
    missing = [name for name in options.only or CALIBRATIONS if name not in {row["calibration"] for row in rows}]
    bench = Bench(options.windows, options.window, options.cache) if missing else None
    for name in missing:
        assert bench is not None
        rows.append({"calibration": name, **bench.judge.row(bench.edited(*CALIBRATIONS[name]))})
        rows.sort(key=lambda row: list(CALIBRATIONS).index(row["calibration"]))
        write_results(
            name_of_results,
            rows,
            ["calibration", *Judge.COLUMNS],
            f"""# What calibration costs on every kind of text: SmolLM2-135M, a fifth of the FFN, no training
Up to {options.windows} windows of {options.window} tokens calibrate, of each source in a mixture (Python's reference
has fewer than 200); perplexity over the dense model's on {HELD} windows of every kind, none of which calibrates
anything: the worst, the geometric mean, the lowest share of equal next tokens. "{ONE}": from the beginning alone;
"self": from the beginning, the chat template and tokens at random.
Command: `python eval/lm_kinds.py --windows {options.windows} --window {options.window} [--only CALIBRATION]`.""",
            settings=settings,
            dense={kind: math.exp(loss) for kind, (loss, _) in bench.judge.dense.items()},
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=DEFAULT)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--cache", type=Path, help="keep windows and moments here between runs")
    parser.add_argument("--only", nargs="+", choices=CALIBRATIONS, help="only these calibrations")
    main(parser.parse_args())
