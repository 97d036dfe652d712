"""A file of text for a heal: alone, beside what the model writes itself, which is the default, and that alone.

    MODHIFI_DATA=DIR python eval/heal_text.py [--steps N]

DIR holds wikitext2-valid.txt; the model is that of eval/lm_prune.py. Rows that the results file has are not measured
again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch
from common import RESULTS, wikitext_file, write_results
from heal import HELD, WORK, show
from lm_prune import WINDOW, smollm2
from lm_texts import KINDS, Judge, stacked
from torch import Tensor

import modhifi
from modhifi.data.sources import load_samples
from modhifi.data.text import HEADING

# Articles that are learnt from; the held-out windows are of the others.
LEARNT = 45
FILE, OTHERS, SMALL = WORK / "articles.txt", WORK / "other-articles.txt", WORK / "text-pruned"
PRUNED = "pruned"
WAYS = {
    "the file": f"text:{FILE}@1",
    "the file and its own writing": f"text:{FILE},self",
    "its own writing": "self",
}
COLUMNS = ["learnt from", "steps", *Judge.COLUMNS, "core minutes"]


def held_out() -> dict[str, Tensor]:
    """Writes the file to learn from, and makes held-out windows of every kind."""
    articles = [part for part in HEADING.split(wikitext_file().read_text(encoding="utf-8")) if part.strip()]
    FILE.write_text("".join(articles[:LEARNT]), encoding="utf-8")
    OTHERS.write_text("".join(articles[LEARNT:]), encoding="utf-8")
    loaded = smollm2()
    windows = {kind: make(loaded, HELD, WINDOW) for kind, make in KINDS.items() if kind != "WikiText-2"}
    windows["WikiText-2"] = load_samples(f"text:{OTHERS}", loaded, n=HELD, window=WINDOW)
    return {kind: stacked(windows[kind]) for kind in KINDS}


def main(steps: int) -> None:
    path = RESULTS / "heal_text.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    original = smollm2()
    judge = Judge(original, held_out(), lambda _, make: make())
    common: dict[str, Any] = {
        "window": WINDOW,
        "evaluate": f"text:{OTHERS}",
        "evaluation_samples": HELD,
        "checks": {"walked": 0},
        "progress": show,
    }

    def add(name: str, taken: int, model: torch.nn.Module, **more: Any) -> None:
        rows.append({"learnt from": name, "steps": taken, **judge.row(model), **more})
        write_results(
            "heal_text",
            rows,
            COLUMNS,
            f"""# A file of text for a heal of SmolLM2-135M
Pruned to 80 % of its FFN neurons on 64 windows of {LEARNT} articles of WikiText-2 and as many that it wrote itself,
then distilled from the original (`modhifi heal`) on 128 windows. Perplexity over the original's on {HELD} windows of
{WINDOW} tokens of every kind of text (`eval/lm_texts.py`), those of WikiText-2 from other articles. Core minutes are
those of the heal, its writing included where it was not kept from before. One seed.
Command: `python eval/heal_text.py`.""",
        )

    if not SMALL.is_dir():
        method = {"only": ["neurons"]}
        modhifi.prune(original, f"text:{FILE},self", ratio=0.2, samples=64, method=method, out=SMALL, **common)
    if not any(row["learnt from"] == PRUNED for row in rows):
        add(PRUNED, 0, modhifi.load(SMALL))
    for name, data in WAYS.items():
        if any((row["learnt from"], row["steps"]) == (name, steps) for row in rows):
            continue
        start = time.process_time()
        healed = modhifi.heal(SMALL, data, against=original, samples=128, batch_size=4, steps=steps, **common)
        assert healed.model is not None
        minutes = (time.process_time() - start) / 60
        add(name, steps, healed.model, **{"core minutes": minutes, "healing": healed.report["healing"]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    WORK.mkdir(parents=True, exist_ok=True)
    main(parser.parse_args().steps)
