"""Peak memory of pruning a language model by its depth: block by block, and with every Gram at once.

    python eval/lm_memory.py

Llamas with random weights, a narrow residual stream and wide FFNs, so that Grams and not weights are what fills memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import write_results

from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments

DEPTHS, HIDDEN, FFN, WINDOWS, WINDOW = (2, 4, 8, 16), 64, 1024, 4, 128
SETTINGS = PruneSettings(layout="uniform", rows_per_column=None, batch_size=2, floor=0.8)
BUDGET = Budget("components", 0.9)


def llama(depth: int) -> LoadedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
    )
    return load_model(transformers.LlamaForCausalLM(config))


def tokens() -> Samples:
    items = torch.randint(512, (WINDOWS, WINDOW), generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(WINDOWS)))
    return Samples(items.__getitem__, names, None, names, "random tokens", False)


def at_once(loaded: LoadedModel) -> None:
    structure = choose_groups(find_structure(loaded), SETTINGS)
    moments = measure_moments(loaded, structure, tokens(), SETTINGS.sampling)
    curves = removal_curves(loaded.model, structure, moments, SETTINGS)
    plan = make_plan(loaded.model, structure, curves, BUDGET, SETTINGS)
    apply_plan(loaded, structure, plan, moments, SETTINGS)


def by_block(loaded: LoadedModel) -> None:
    prune_model(loaded, tokens(), BUDGET, SETTINGS)


def peak(run: Callable[[], object]) -> int:
    """The peak of the process's resident memory while ``run`` runs, in bytes; on Linux, where it can be reset."""
    Path("/proc/self/clear_refs").write_text("5")
    run()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


def above(run: Callable[[LoadedModel], None], depth: int) -> float:
    """MiB that a run adds to what the process holds before it, at its peak."""
    loaded = llama(depth)
    before = peak(lambda: None)
    return (peak(lambda: run(loaded)) - before) / 2**20


if __name__ == "__main__":
    torch.set_num_threads(1)
    above(by_block, DEPTHS[0])  # what libraries load at first use
    rows: list[dict[str, Any]] = []
    for depth in DEPTHS:
        rows.append(
            {
                "blocks": depth,
                "block by block (MiB)": above(by_block, depth),
                "all at once (MiB)": above(at_once, depth),
            }
        )
    weights = sum(p.numel() for p in llama(1).model.model.layers.parameters()) * 4 / 2**20
    write_results(
        "lm_memory",
        rows,
        list(rows[0]),
        f"""# Peak memory of pruning by depth
Resident memory of the process at the peak, above what it held before; Llama with random weights, residual width
{HIDDEN}, FFN width {FFN}, {WINDOWS} windows of {WINDOW} tokens. A Gram takes
{FFN * FFN * 8 / 2**20:.0f} MiB, a block's weights {weights:.1f} MiB; a run makes two copies of the weights, which
is what grows block by block.
Command: `python eval/lm_memory.py`.""",
    )
