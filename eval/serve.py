"""Where a pruned model goes: every hand-over held against the artefact itself, with the size of what it became.

    MODHIFI_DATA=DIR python eval/serve.py [--part PART ...] [--windows N] [--artefact DIR]

The parts: gguf (needs llama.cpp's converter on the PATH and the package xllamacpp), torchao, onnx, openvino. Each adds
its rows to results/serve.json and serve.md. Data and model of the language model as for eval/lm_prune.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import HERE, RESULTS, accuracy, perplexity, write_results
from hand_overs import TORCHAO, LlamaCpp, megabytes, onnx_int8, onnx_runtime, openvino, to_gguf, torchao
from lm_prune import smollm2, wikitext
from torch import Tensor, nn

import modhifi
from modhifi.data.sources import load_samples

WORK = HERE / "data" / "serve"
# Widths that every block format of GGUF and every group of four bits divides.
MULTIPLE = 32
HELD, TOKENS, IMAGES, BATCH = 4, 128, 500, 100
COLUMNS = ["model", "handed to", "as", "MB", "quality", "the artefact's", "ratio or difference"]
INTRO = f"""# Handed over
SmolLM2-135M without a fifth of its FFN neurons, `--round-to {MULTIPLE}`: perplexity on {HELD} windows of {TOKENS}
tokens of WikiText-2 in the runtime named, and in transformers (float32), and their ratio. The demo's ResNet at half its
FLOPs: top-1 in % of {IMAGES} test images, and the largest difference of a logit where weights are those of the
artefact. Sizes of what the tool stores.
Command: `python eval/serve.py`."""
Row = dict[str, Any]
Logits = Callable[[Tensor], Tensor]


class Language:
    """The pruned language model as an artefact, and held-out windows."""

    def __init__(self, windows: int, artefact: Path | None) -> None:
        self.original = smollm2()
        self.directory = artefact or WORK / "small"
        calibration, held = wikitext(self.original, windows)
        self.held = torch.stack([held.load(i)[:TOKENS] for i in range(HELD)])
        if not self.directory.is_dir():
            method = {"only": ["neurons"], "round_to": MULTIPLE}
            options = {"evaluate": held, "evaluation_samples": HELD, "checks": {"walked": 0}, "force": True}
            modhifi.prune(
                self.original, calibration, ratio=0.2, samples=windows, method=method, out=self.directory, **options
            )
        self.model = modhifi.load(self.directory)
        self.artefact = self.perplexity(self.model)

    def perplexity(self, model: nn.Module) -> float:
        samples = load_samples(list(self.held), self.original, n=HELD)
        return perplexity(lambda batch: self.original.logits(batch, model), samples)

    def row(self, tool: str, kind: str, size: float, value: float) -> Row:
        named = {"model": "SmolLM2", "handed to": tool, "as": kind, "MB": size}
        return {
            **named,
            "quality": value,
            "the artefact's": self.artefact,
            "ratio or difference": value / self.artefact,
        }


class Images:
    """The pruned demo as an artefact and as an ONNX file, and test images."""

    def __init__(self) -> None:
        directory = WORK / "demo"
        self.original = modhifi.load_model("demo:resnet")
        self.test = load_samples("demo:test", self.original, n=IMAGES)
        if not directory.is_dir():
            options = {"evaluate": "demo:test", "checks": {"walked": 0}, "export": ["onnx"], "force": True}
            modhifi.prune("demo:resnet", "demo:calibration", flops="0.5x", samples=500, out=directory, **options)
        self.model, self.file = modhifi.load(directory), directory / "model.onnx"
        self.artefact = accuracy(self.model, self.test, BATCH)

    def row(self, tool: str, kind: str, size: float, logits: Logits, same: bool) -> Row:
        """``same``: the weights are the artefact's, so that its logits should be met."""
        batch = self.test.first(BATCH)
        with torch.no_grad():
            difference = float((logits(batch) - self.model(batch)).abs().max())
        named = {"model": "demo's ResNet", "handed to": tool, "as": kind, "MB": size}
        top = accuracy(logits, self.test, BATCH)
        compared = difference if same else top / self.artefact
        return {**named, "quality": top, "the artefact's": self.artefact, "ratio or difference": compared}


def gguf(options: argparse.Namespace) -> Iterator[Row]:
    """Through llama.cpp's converter, and run by llama.cpp."""
    text = Language(options.windows, options.artefact)
    source = Path(str(text.original.source))
    dense = text.perplexity(text.original.model)
    for file, kind, artefact in (
        (source, "the file that was pruned (Q4_1), dense", dense),
        (text.directory, "f16", text.artefact),
        (text.directory, "q8_0", text.artefact),
    ):
        if file.is_dir():
            file = to_gguf(text.directory, WORK / f"small-{kind}.gguf", kind)
        row = text.row("llama.cpp", kind, megabytes(file), LlamaCpp(file).perplexity(text.held))
        yield {**row, "the artefact's": artefact, "ratio or difference": row["quality"] / artefact}


def quantised(options: argparse.Namespace) -> Iterator[Row]:
    """In torchao's hands, as a module."""
    text = Language(options.windows, options.artefact)
    yield text.row("transformers", "the artefact (float32)", megabytes(text.directory), text.artefact)
    for kind in TORCHAO:
        model = torchao(text.model, kind)
        stored = io.BytesIO()
        torch.save(model.state_dict(), stored)
        yield text.row("torchao", kind, stored.tell() / 1e6, text.perplexity(model))


def onnx(options: argparse.Namespace) -> Iterator[Row]:
    """In ONNX Runtime, as exported and with eight bits."""
    images = Images()
    yield images.row("ONNX Runtime", "model.onnx", megabytes(images.file), onnx_runtime(images.file), True)
    small = onnx_int8(images.file, WORK / "demo-int8.onnx")
    yield images.row("ONNX Runtime", "dynamic int8", megabytes(small), onnx_runtime(small), False)


def vino(options: argparse.Namespace) -> Iterator[Row]:
    """In OpenVINO, which reads the ONNX file."""
    images = Images()
    yield images.row("OpenVINO", "model.onnx", megabytes(images.file), openvino(images.file), True)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "gguf": gguf,
    "torchao": quantised,
    "onnx": onnx,
    "openvino": vino,
}


def add(part: str, rows: list[Row]) -> None:
    """Writes the table with the rows in the place of earlier ones of their part."""
    file = RESULTS / "serve.json"
    others = [r for r in json.loads(file.read_text())["rows"] if r["part"] != part] if file.is_file() else []
    everything = sorted([*others, *({**row, "part": part} for row in rows)], key=lambda r: list(PARTS).index(r["part"]))
    write_results("serve", everything, COLUMNS, INTRO)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="only these; may be repeated")
    parser.add_argument("--windows", type=int, default=8, help="that calibrate the language model")
    parser.add_argument("--artefact", type=Path, help="a pruned SmolLM2 that is there already")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    for name in arguments.part or PARTS:
        add(name, list(PARTS[name](arguments)))
