from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modhifi.artifacts.export import export
from modhifi.artifacts.exports import EXPORTS
from modhifi.errors import GateFailed, ModhifiError


def run_onnx(path: Path, batch: Tensor) -> Tensor:
    import onnxruntime

    return torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, {"input": batch.numpy()})[0])


# How a stranger runs each kind of file; a new format needs a row here.
RUNNERS = {"onnx": run_onnx, "pt2": lambda path, batch: torch.export.load(path).module()(batch)}


def need(kind: str) -> None:
    if not all(importlib.util.find_spec(name) for name in EXPORTS[kind].packages):
        pytest.skip(f"the {EXPORTS[kind].extra} extra is not installed")


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU())
    model = nn.Sequential(stem, nn.Conv2d(5, 7, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_exported_file_runs_on_any_batch_size(tmp_path, capsys, kind: str):
    need(kind)
    model, example = tiny_net(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "deep" / f"model{EXPORTS[kind].suffix}"
    assert export(model, example, path, kind) < 1e-4
    assert list(path.parent.iterdir()) == [path]
    assert capsys.readouterr().out == ""
    batch = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(RUNNERS[kind](path, batch), model(batch), atol=1e-4)


def test_language_model_gives_its_logits(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    example = torch.arange(12).reshape(2, 6)
    export(model, example, tmp_path / "model.pt2", "pt2")
    outputs = torch.export.load(tmp_path / "model.pt2").module()(example)
    assert torch.allclose(outputs, model(example, use_cache=False).logits, atol=1e-5)


def test_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    def write(model, example, file):
        file.write_bytes(b"wrong")
        return lambda batch: model(batch) + 0.01

    monkeypatch.setitem(EXPORTS.entries, "pt2", replace(EXPORTS["pt2"], write=write))
    with pytest.raises(GateFailed, match="0.01"):
        export(nn.Linear(3, 2).eval(), torch.randn(2, 3), tmp_path / "model.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_exported_is_one_line(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ModhifiError) as caught:
        export(Branching(), torch.randn(2, 3), tmp_path / "model.pt2", "pt2")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_remedy(tmp_path):
    lacking = replace(EXPORTS["onnx"], packages=("onnx_that_is_not_there",))
    with pytest.raises(ModhifiError, match=r"onnx_that_is_not_there; run: pip install 'modhifi\[onnx\]'"):
        lacking.check()
    EXPORTS["pt2"].check()
    with pytest.raises(ModhifiError, match="unknown kind of export 'tflite'"):
        export(tiny_net(), torch.randn(2, 3, 32, 32), tmp_path / "model", "tflite")


def test_half_precision_is_refused_for_onnx(tmp_path):
    need("onnx")
    with pytest.raises(ModhifiError, match="float32"):
        export(nn.Linear(3, 2).half(), torch.randn(2, 3), tmp_path / "m.onnx", "onnx")
