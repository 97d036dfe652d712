"""What giving memory back costs: convolutions timed while glibc gives freed memory back, and while it is kept.

    python eval/steady_memory.py

One thread, its own clock, which counts the work of the system for it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import write_results
from torch import nn

from modhifi.runs.steady_memory import steady_memory
from modhifi.runs.timing.machine import device_name

BATCH, SIDE, ROUNDS = 32, 32, 9
INPUTS, OUTPUTS = (8, 64), (8, 16, 24, 32, 40, 48, 56, 64)


@torch.inference_mode()
def milliseconds(inputs: int, outputs: int) -> float:
    """The least of several passes of one 3 x 3 convolution."""
    conv, x = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), torch.randn(BATCH, inputs, SIDE, SIDE)
    taken = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        conv(x)
        taken.append(time.thread_time() - start)
    return 1000 * min(taken)


def main() -> None:
    pairs = [(i, o) for i in INPUTS for o in OUTPUTS]
    back = [milliseconds(*pair) for pair in pairs]
    with steady_memory():
        kept = [milliseconds(*pair) for pair in pairs]
    rows: list[dict[str, Any]] = [
        {"inputs": i, "outputs": o, "given back, ms": b, "kept, ms": k, "ratio": b / k}
        for (i, o), b, k in zip(pairs, back, kept, strict=True)
    ]
    write_results(
        "steady_memory",
        rows,
        ["inputs", "outputs", "given back, ms", "kept, ms", "ratio"],
        f"""# What giving memory back costs
{device_name("cpu")}, one thread: a 3 x 3 convolution of a batch of {BATCH} at {SIDE} x {SIDE}, by its channels, with
glibc's defaults, which give freed memory back, and while it is kept, as `modhifi` has it while it times. The ratio is
at most {max(row["ratio"] for row in rows):.1f}.
Command: `python eval/steady_memory.py`.""",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
