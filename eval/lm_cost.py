"""What a whole prune of SmolLM2-135M costs over a plain forward pass of the same tokens, in processor time.

MODHIFI_DATA=DIR python eval/lm_cost.py [--windows N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from common import write_results
from lm_prune import SETTINGS, WINDOW, smollm2, wikitext

from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one call: what other programs do on the machine does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=32)
    windows = parser.parse_args().windows
    torch.set_num_threads(1)
    loaded = smollm2()
    calibration, _ = wikitext(loaded, windows)

    def forward() -> None:
        with torch.inference_mode():
            for batch in calibration.batches(SETTINGS.batch_size):
                loaded.logits(batch)

    settings = replace(SETTINGS, floor=0.1)
    plain = seconds(forward)
    whole = seconds(lambda: prune_model(loaded, calibration, Budget("components", 0.8), settings))
    row = {"tokens": windows * WINDOW, "plain forward (s)": plain, "whole prune (s)": whole, "ratio": whole / plain}
    write_results(
        "lm_cost",
        [row],
        list(row),
        f"""# Cost of a whole prune of SmolLM2-135M
Tracing, moments, selection, least squares and surgery, block by block, FFN neurons at 20 % in uniform layout, against a
plain forward pass with logits over the same tokens; processor time of one thread. Command:
`python eval/lm_cost.py --windows {windows}`.""",
    )
