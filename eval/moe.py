"""Which experts of a mixture to remove: REAP, frequency, chance and ours side by side, on a small model trained here.

    python eval/moe.py            # trains for eight minutes on one CPU, once; writes eval/results/moe.md and moe.json

The model is a Mixtral of 8 experts a layer, 2 for a token, on the bytes of Python's own standard library; held out are
modules that it was not trained on. Calibration windows come from the training modules.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from common import HERE, write_results
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from modhifi.data.in_memory import samples_from
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.expert_removal import prune_experts
from modhifi.pruning.settings import PruneSettings

MODEL = HERE / "models" / "moe"
WINDOW, BATCH, MINUTES = 128, 16, 8.0
CALIBRATION, HELD_OUT = 64, 192
KEEP = (0.75, 0.5)
SEEDS = 3
# What is compared: a selector of experts and a compensation; REAP and frequency as they were published, and fitted.
METHODS = (
    ("random", "none"),
    ("frequency", "none"),
    ("reap", "none"),
    ("removal", "none"),
    ("random", "lstsq"),
    ("frequency", "lstsq"),
    ("reap", "lstsq"),
    ("removal", "lstsq"),
)


def sources() -> tuple[Tensor, Tensor]:
    """The bytes of the standard library's modules, every tenth of them held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 2000)
    parts = [b"\n".join(path.read_bytes() for path in files[start::10]) for start in range(10)]
    held, seen = parts[0], b"\n".join(parts[1:])
    return torch.frombuffer(bytearray(seen), dtype=torch.uint8), torch.frombuffer(bytearray(held), dtype=torch.uint8)


def windows(text: Tensor, count: int, seed: int) -> Tensor:
    """Windows at random places, int64 ``(count, WINDOW)``."""
    starts = torch.randint(len(text) - WINDOW, (count,), generator=torch.Generator().manual_seed(seed))
    return text[starts[:, None] + torch.arange(WINDOW)].long()


def train(text: Tensor, minutes: float) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=WINDOW,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    start, step, share = time.process_time(), 0, 0.0
    while share < 1:
        share = (time.process_time() - start) / (60 * minutes)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.02, 0.5 * (1 + math.cos(math.pi * min(1, share))))
        batch = windows(text, BATCH, 1000 + step)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step}: loss {float(loss):.3f}, {100 * share:.0f} % of the time", flush=True)
    model.config.output_router_logits = False
    return model.eval()


@torch.inference_mode()
def bits(model: torch.nn.Module, held: Tensor) -> float:
    """Bits a byte on the held-out windows."""
    losses = [float(model(batch, labels=batch).loss) for batch in held.split(32)]
    return sum(losses) / len(losses) / math.log(2)


def rows(loaded: LoadedModel, seen: Tensor, held: Tensor) -> list[dict[str, object]]:
    samples = samples_from(list(windows(seen, CALIBRATION, 7)), loaded, n=CALIBRATION, seed=0)
    dense = bits(loaded.model, held)
    table: list[dict[str, object]] = [{"experts": "8 of 8", "selector": "", "compensation": "", "bits a byte": dense}]
    for keep in KEEP:
        for selector, compensation in METHODS:
            seeds = range(SEEDS if selector == "random" else 1)
            found, took = [], time.perf_counter()
            for seed in seeds:
                settings = PruneSettings(experts=selector, compensate=compensation, seed=seed)
                found.append(bits(prune_experts(loaded, samples, keep, settings).model, held))
            table.append(
                {
                    "experts": f"{round(8 * keep)} of 8",
                    "selector": selector,
                    "compensation": compensation,
                    "bits a byte": sum(found) / len(found),
                    "more than dense": sum(found) / len(found) - dense,
                    "seconds": (time.perf_counter() - took) / len(found),
                }
            )
            print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="CPU time of the training")
    minutes = parser.parse_args().minutes
    seen, held = sources()
    if not (MODEL / "model.safetensors").is_file():
        train(seen, minutes).save_pretrained(MODEL)
    loaded = load_model(MODEL)
    table = rows(loaded, seen, windows(held, HELD_OUT, 8))
    parameters = sum(p.numel() for p in loaded.model.parameters())
    write_results(
        "moe",
        table,
        ["experts", "selector", "compensation", "bits a byte", "more than dense", "seconds"],
        f"""# Removing experts: REAP, frequency, chance and ours

Written by `python eval/moe.py`. A Mixtral of {parameters / 1e6:.1f} million parameters, 4 layers of 8 experts, trained
for {minutes:g} minutes of CPU time on the bytes of Python's standard library; {CALIBRATION} windows of {WINDOW} bytes
calibrate, {HELD_OUT} windows of modules that it never saw measure. Random: the mean of {SEEDS} seeds. `lstsq` fits the
matrices that stay to what the mixture computed before.""",
    )


if __name__ == "__main__":
    main()
