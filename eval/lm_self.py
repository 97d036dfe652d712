"""Text that SmolLM2-135M writes itself as calibration, next to text of the domain it is measured on, at equal tokens.

    MODHIFI_DATA=DIR python eval/lm_self.py [--windows N] [--ratio R]

Data and model as for eval/lm_prune.py. Rows that eval/results/lm_self.json has are not measured again.
"""

from __future__ import annotations

import argparse
from functools import partial

from lm_prune import SETTINGS, WINDOW, Table, smollm2, wikitext
from torch import nn

from modhifi.allocate import Budget
from modhifi.data import Samples, load_samples
from modhifi.load import LoadedModel
from modhifi.pruning import prune_model


def pruned(loaded: LoadedModel, calibration: Samples, ratio: float) -> nn.Module:
    return prune_model(loaded, calibration, Budget("components", 1 - ratio), SETTINGS).model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=32, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of FFN neurons removed, in every layer")
    options = parser.parse_args()
    loaded = smollm2()
    domain, held = wikitext(loaded, options.windows)
    table = Table(
        "lm_self", loaded, held, ["FFN removed", "calibration"],
        f"""# What calibration text costs: SmolLM2-135M, uniform layout, no training
{options.windows * WINDOW} tokens calibrate; perplexity on articles of WikiText-2 that calibrate nothing.
That text is of a kind of its own (blanks around punctuation, `<unk>`), which no model writes.
Command: `python eval/lm_self.py --windows {options.windows}`.""",
    )  # fmt: skip
    table.add(lambda: loaded.model, **{"FFN removed": 0.0, "calibration": "(dense)"})
    table.add(partial(pruned, loaded, domain, options.ratio),
              **{"FFN removed": options.ratio, "calibration": "WikiText-2, other articles"})  # fmt: skip

    def itself() -> nn.Module:
        written = load_samples("self", loaded, n=options.windows, window=WINDOW)
        print(written.description)
        return pruned(loaded, written, options.ratio)

    table.add(itself, **{"FFN removed": options.ratio, "calibration": "self"})
