"""What measures networks for a budget that is a time or a memory."""

from __future__ import annotations

import torch

from modhifi.calibration.cache import MomentCache
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress
from modhifi.pruning.budget import Budget
from modhifi.pruning.metered import Meter
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.runs.timing.bench import check_threads
from modhifi.runs.timing.footprints import MemoryMeter
from modhifi.runs.timing.networks import Timer
from modhifi.runs.timing.runtimes import RUNTIMES


def meter_of(
    recipe: PruneRecipe, original: LoadedModel, budget: Budget | None, cache: MomentCache | None, progress: Progress
) -> Meter | None:
    """The meter of a budget, None for one that is counted; raises ModhifiError for what cannot be measured."""
    if budget is None or budget.measure not in ("latency", "memory"):
        return None
    if recipe.offload:
        raise ModhifiError(
            "weights that visit the device say nothing of its time and memory; give another budget or no --offload"
        )
    timing, window = recipe.timing, recipe.data.window
    if budget.measure == "memory":
        return MemoryMeter(timing.latency_batch, window)
    threads = timing.threads or torch.get_num_threads()
    check_threads([threads])
    RUNTIMES[timing.runtime].check()
    if timing.phase == "decode":
        if original.kind != "text":
            raise ModhifiError("only a causal language model decodes; leave out --phase decode")
        if timing.runtime != "eager":
            raise ModhifiError("a token behind a window is timed in eager mode; leave out --runtime, or --phase decode")
    place = None if cache is None else cache.entries.directory / "latency"
    return Timer(timing.runtime, timing.latency_batch, threads, window, timing.phase == "decode", place, progress)
