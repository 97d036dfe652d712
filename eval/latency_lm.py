"""SmolLM2-135M at a share of its measured time: fewer neurons, fewer blocks, or both, for a window and for one token.

    MODHIFI_DATA=DIR python eval/latency_lm.py [--share 0.75x] [--phase prefill decode] [--windows N]

Data and model are those of eval/lm_prune.py. One thread, timed by its own clock. Rows that the results file has are not
measured again.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from typing import Any

import torch
from common import RESULTS, write_results
from lm_prune import WINDOW, smollm2, wikitext

import modhifi
from modhifi.runs.timing.machine import device_name

KINDS = {"neurons": ["neurons"], "blocks": ["blocks"], "neurons and blocks": ["neurons", "blocks"]}
TIMED = 128
COLUMNS = ["timed", "what goes", "asked", "time", "spread", "parameters", "perplexity over dense"]


def row(phase: str, kind: str, share: str, windows: int) -> dict[str, Any]:
    """Prunes to a share of the time, and measures on held-out articles."""
    original = smollm2()
    calibration, held = wikitext(original, windows)
    report = modhifi.prune(
        original,
        calibration,
        latency=share,
        samples=windows,
        evaluate=held,
        evaluation_samples=len(held),
        window=TIMED,
        timing={"phase": phase, "threads": 1},
        method={"only": KINDS[kind], "layout": "global"},
        checks={"walked": 0},
    ).report
    rows = {entry["name"]: entry for entry in report["before_after"]}
    parameters, perplexity = rows["parameters"], rows["perplexity"]
    return {
        "timed": phase,
        "what goes": kind,
        "asked": share,
        "time": report["metered"]["taken"]["measured"],
        "spread": report["metered"]["taken"]["spread"],
        "parameters": parameters["after"] / parameters["before"],
        "perplexity over dense": perplexity["after"] / perplexity["before"],
        "tried": report["metered"]["attempts"],
    }


def main(options: argparse.Namespace) -> None:
    settings = {"windows": options.windows}
    path = RESULTS / "latency_smollm2.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[dict[str, Any]] = earlier["rows"] if earlier.get("settings") == settings else []
    done = {(entry["timed"], entry["what goes"], entry["asked"]) for entry in rows}
    for phase, kind in product(options.phase, KINDS):
        if (phase, kind, options.share) in done:
            continue
        rows.append(row(phase, kind, options.share, options.windows))
        rows.sort(key=lambda entry: (entry["asked"], entry["timed"]))
        write_results(
            "latency_smollm2",
            rows,
            COLUMNS,
            f"""# SmolLM2-135M at a share of its measured time, no training
{device_name("cpu")}, one thread, eager, batch 1: `prefill` times a window of {TIMED} tokens, `decode` one token behind
it. Time and parameters over the original's. {options.windows} windows of {WINDOW} tokens of WikiText-2 calibrate, the
perplexity is that of 16 of other articles. Widths and blocks compete by cost per measured time.
Command: `python eval/latency_lm.py`.""",
            settings=settings,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", default="0.75x")
    parser.add_argument("--phase", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--windows", type=int, default=64, help=f"calibration windows of {WINDOW} tokens")
    torch.set_num_threads(1)
    main(parser.parse_args())
