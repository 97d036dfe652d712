"""A model that gives one number: what is lost where it is taken for the score of a class, and where it is not.

    MODHIFI_DATA=DIR python eval/values.py

DIR holds cifar10.tar.gz. The number is the margin between two logits of the demo's ResNet, as a reranker or a
regression has it: a network of timm with one output, with all that is before its head.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from common import cifar10, reference, write_results
from timm.models import save_for_hf
from torch import Tensor, nn

import modhifi
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.loaded import LoadedModel

FIRST, SECOND = "cat", "dog"
SAMPLES, HELD, STEPS, LEARNT = 1000, 2000, 400, 5000
COLUMNS = ["FLOPs kept", "output taken for", "R² pruned", "R² healed"]


def margin(directory: Path) -> LoadedModel:
    """The demo's ResNet with the difference of two of its logits as its only output."""
    loaded = reference("demo")
    assert loaded.labels is not None
    first, second = map(loaded.labels.index, (FIRST, SECOND))
    model, head = loaded.model, loaded.model.get_submodule("fc")
    one = nn.Linear(head.in_features, 1)
    with torch.no_grad():
        one.weight[0] = head.weight[first] - head.weight[second]
        one.bias[0] = head.bias[first] - head.bias[second]
    model.fc, model.num_classes = one, 1
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "label_names"}
    save_for_hf(model, directory, model_args=loaded.info["model_args"] | {"num_classes": 1}, safe_serialization=True)
    return modhifi.load_model(directory)


@torch.no_grad()
def explained(loaded: LoadedModel, model: nn.Module, held: Samples) -> float:
    """The share of the variance of the original's number that is kept."""

    def numbers(module: nn.Module) -> Tensor:
        return torch.cat([loaded.logits(batch, module)[:, 0] for batch in held.batches(100)])

    before, after = numbers(loaded.model), numbers(model)
    return 1 - float((after - before).square().mean() / before.var(correction=0))


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        loaded, images = margin(Path(folder)), cifar10()
        held = load_samples(f"images:{images / 'test'}", loaded, n=HELD)
        train = f"images:{images / 'train'}"
        common: dict[str, Any] = {"evaluate": held.subset(range(200)), "checks": {"walked": 0}}
        for flops in ("0.7x", "0.5x"):
            for name, values in (("the score of a class", False), ("a value", True)):
                with patch.object(LoadedModel, "gives_values", PropertyMock(return_value=values)):
                    small = modhifi.prune(loaded, train, flops=flops, samples=SAMPLES, **common)
                    more = {"against": loaded, "samples": LEARNT, "steps": STEPS}
                    healed = modhifi.heal(small.model, train, **more, **common)
                assert healed.model is not None
                found = [explained(loaded, model, held) for model in (small.model, healed.model)]
                rows.append(dict(zip(COLUMNS, (flops, name, *found), strict=True)))
                print(rows[-1], flush=True)
    write_results(
        "values",
        rows,
        COLUMNS,
        f"""# A model that gives one number
The demo's ResNet with the margin of {FIRST} over {SECOND} as its only output, pruned on {SAMPLES:,} unlabelled training
images and healed on {LEARNT:,} for {STEPS} steps. R² is the share of the variance of the original's number that is
kept, on {HELD:,} test images. Taken for the score of a class the softmax of one number is 1 whatever it is: no group
seems to matter more than another, and no step of a heal looks better than none.
Command: `python eval/values.py`.""",
    )


if __name__ == "__main__":
    main()
