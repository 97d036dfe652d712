"""One pass over a set, and what an attack may read from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.calibration.prefix_cache import Passes
from modhifi.data.samples import Samples
from modhifi.models.hooks import only_input
from modhifi.models.loaded import LoadedModel
from modhifi.structure.tracing.branches import Calls
from modhifi.unlearning.sites import Sites, Writer


@dataclass(frozen=True)
class Observed:
    """One pass over a set: logits ``(n, classes)``, what the classifier reads ``(n, d)``, pooled streams by block."""

    logits: Tensor
    features: Tensor
    streams: Mapping[str, Tensor]


@torch.no_grad()
def observe(loaded: LoadedModel, model: nn.Module, sites: Sites, samples: Samples, batch_size: int) -> Observed:
    """Run a model of the sites' architecture and keep its logits, features and streams (mean over positions)."""
    return observe_passes(Passes(loaded, model, samples, batch_size), sites)


@torch.no_grad()
def observe_passes(runs: Passes, sites: Sites, before: Observed | None = None) -> Observed:
    """What :func:`observe` gives, of passes; ``before`` is that of another copy whose :meth:`Passes.of` they are."""
    last: dict[str, Writer] = {writer.site.block: writer for writer in sites.writers}
    streams: dict[str, dict[int, Tensor]] = {block: {} for block in last}
    features: list[Tensor] = []
    first, count = 0, 0

    def pool(block: str, stream: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            rows = last[block].rows
            rows = rows[rows[:, 0] >= 0]
            if sites.focus is not None and last[block].joined and int(sites.focus.max()) < len(rows):
                rows = rows[sites.focus]
            flat = stream.detach().reshape(count, -1)
            streams[block][first] = flat[:, rows.to(flat.device)].float().mean(1).cpu()

    handles: list[Any] = [
        runs.model.get_submodule(sites.heads[0]).register_forward_pre_hook(
            lambda _, args, named: features.append(only_input(args, named).detach().flatten(1).float().cpu()),
            with_kwargs=True,
        )
    ]
    calls = Calls({writer.call: partial(pool, block) for block, writer in last.items()})
    logits = []
    try:
        for first, run in runs:
            count = min(runs.batch_size, len(runs.samples) - first)
            with calls:
                out = run(calls)
            if before is not None:  # a block that did not run again put out what it did there
                for block, known in before.streams.items():
                    streams[block].setdefault(first, known[first : first + count])
            logits.append(out.float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    joined = {block: torch.cat(list(parts.values())) for block, parts in streams.items()}
    return Observed(torch.cat(logits), torch.cat(features), joined)
