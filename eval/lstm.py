"""Hidden units of a character LSTM, removed without training: this package, magnitude and random side by side.

    python eval/lstm.py [--layers N] [--width N] [--minutes M]

Trains on the reference that every Python carries (``pydoc_data.topics``) for ``--minutes`` on one thread, keeps the
weights under eval/data, and measures the next-character accuracy and the perplexity of a character on topics that
neither trained nor calibrated.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from common import HERE, write_results
from torch import Tensor, nn

from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings

WINDOW, CALIBRATION, HELD, SEEDS = 96, 256, 256, (0, 1, 2)
REMOVED = (0.25, 0.5, 0.75)
METHODS = {
    "ours (obs, lstsq)": ("obs", "lstsq"),
    "magnitude, lstsq": ("magnitude", "lstsq"),
    "magnitude": ("magnitude", "none"),
    "random, lstsq": ("random", "lstsq"),
    "random": ("random", "none"),
}


class Characters(nn.Module):
    """Logits of the next character at every place of a window."""

    def __init__(self, symbols: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 64)
        self.lstm = nn.LSTM(64, width, layers, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


def windows() -> tuple[Tensor, Tensor, Tensor, int]:
    """Windows of training, of calibration and held-out topics, and the number of symbols."""
    names = sorted(topics.topics)
    random.Random(0).shuffle(names)
    symbols = sorted(set("".join(topics.topics.values())))
    number = {symbol: i for i, symbol in enumerate(symbols)}
    parts = []
    for some in (
        names[: len(names) * 8 // 10],
        names[len(names) * 8 // 10 : len(names) * 9 // 10],
        names[len(names) * 9 // 10 :],
    ):
        text = "".join(topics.topics[name] for name in some)
        ids = torch.tensor([number[symbol] for symbol in text])
        parts.append(ids[: len(ids) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1))
    return parts[0], parts[1], parts[2], len(symbols)


def trained(ids: Tensor, symbols: int, width: int, layers: int, minutes: float) -> Characters:
    """The network, trained for so long or read from disk."""
    torch.manual_seed(0)
    net = Characters(symbols, width, layers)
    path = HERE / "data" / f"lstm-{width}-{layers}-{minutes:g}.pt"
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    optimiser = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.01)
    start, step = time.perf_counter(), 0
    while (share := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * (1 - share)
        batch = ids[torch.randint(len(ids), (32,))]
        loss = F.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 200 == 0:
            print(f"step {step}, {share:.0%}: loss {loss.item():.3f}", flush=True)
    path.parent.mkdir(exist_ok=True)
    torch.save(net.state_dict(), path)
    return net.eval()


@torch.inference_mode()
def quality(net: nn.Module, ids: Tensor) -> tuple[float, float]:
    """The share of characters foretold, and the perplexity of one."""
    logits = torch.cat([net(part[:, :-1]) for part in ids.split(64)])
    right = (logits.argmax(-1) == ids[:, 1:]).double().mean()
    return float(right), math.exp(float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))


def rows(net: Characters, calibration: Tensor, held: Tensor) -> list[dict[str, Any]]:
    loaded = load_model(net, example=calibration[:2, :-1])
    samples = load_samples(calibration[:, :-1], loaded, n=CALIBRATION)
    accuracy, perplexity = quality(net, held)
    result = [_row(0.0, "(dense)", 1.0, [accuracy], [perplexity])]
    total = sum(p.numel() for p in net.parameters())
    for removed in REMOVED:
        for name, (selector, compensation) in METHODS.items():
            measured, left = [], 1.0
            for seed in SEEDS if selector == "random" else SEEDS[:1]:
                settings = PruneSettings(
                    selector=selector,
                    compensate=compensation,
                    only=("lstm.*",),
                    weighting="energy",
                    rows_per_column=None,
                    seed=seed,
                )
                small = prune_model(loaded, samples, Budget("components", 1 - removed), settings).model
                measured.append(quality(small, held))
                left = sum(p.numel() for p in small.parameters()) / total
            accuracies, perplexities = zip(*measured, strict=True)
            result.append(_row(removed, name, left, list(accuracies), list(perplexities)))
            print(result[-1], flush=True)
    return result


def _row(
    removed: float, method: str, parameters: float, accuracies: list[float], perplexities: list[float]
) -> dict[str, Any]:
    return {
        "units removed": f"{removed:.0%}",
        "method": method,
        "parameters": f"{parameters:.2f}x",
        "next character right, %": spread(accuracies, 100, 1),
        "perplexity": spread(perplexities, 1, 2),
    }


def spread(values: list[float], scale: float, digits: int) -> str:
    mean = scale * sum(values) / len(values)
    text = f"{mean:.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {scale * float(torch.tensor(values).std()):.{digits}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--minutes", type=float, default=4.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    training, calibration, held, symbols = windows()
    net = trained(training, symbols, options.width, options.layers, options.minutes)
    count = min(HELD, len(held))
    size = f"{options.layers} layer{'s' * (options.layers > 1)} of {options.width}"
    write_results(
        f"lstm_{options.layers}",
        rows(net, calibration[:CALIBRATION], held[:HELD]),
        ["units removed", "method", "parameters", "next character right, %", "perplexity"],
        f"""# Hidden units of a character LSTM ({size}), no training after the cut

Trained for {options.minutes:g} minutes on one thread on topics of Python's reference; {CALIBRATION} windows of {WINDOW}
characters of other topics calibrate, {count} of further ones are measured. Random: mean and deviation of {len(SEEDS)}
seeds. Command:
`python eval/lstm.py --layers {options.layers} --width {options.width} --minutes {options.minutes:g}`.""",
    )
