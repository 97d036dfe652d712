from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from modhifi.artifacts import export as export_module
from modhifi.artifacts.export import check_export, export
from modhifi.errors import GateFailed, ModhifiError

HAVE_ONNX = all(importlib.util.find_spec(name) for name in export_module.ONNX_PACKAGES)
needs_onnx = pytest.mark.skipif(not HAVE_ONNX, reason="the onnx extra is not installed")


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU())
    model = nn.Sequential(stem, nn.Conv2d(5, 7, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3))
    return model.eval().requires_grad_(False)


@needs_onnx
def test_onnx_runs_in_onnx_runtime_on_any_batch_size(tmp_path, capsys):
    import onnxruntime

    model, example = tiny_net(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert export(model, example, tmp_path / "deep" / "model.onnx", "onnx") < 1e-4
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model.onnx"]
    assert capsys.readouterr().out == ""
    session = onnxruntime.InferenceSession(str(tmp_path / "deep" / "model.onnx"))
    batch = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (outputs,) = session.run(None, {"input": batch.numpy()})
    assert torch.allclose(torch.from_numpy(outputs), model(batch), atol=1e-4)


def test_program_runs_without_the_model(tmp_path):
    model, example = tiny_net(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert export(model, example, tmp_path / "model.pt2", "pt2") < 1e-4
    batch = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(torch.export.load(tmp_path / "model.pt2").module()(batch), model(batch), atol=1e-4)


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

    monkeypatch.setattr(export_module, "_write_program", write)
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


def test_missing_packages_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(export_module, "ONNX_PACKAGES", ("onnx_that_is_not_there",))
    with pytest.raises(ModhifiError, match=r"onnx_that_is_not_there; run: pip install 'modhifi\[onnx\]'"):
        check_export("onnx")
    check_export("pt2")
    with pytest.raises(ModhifiError, match="unknown kind of export 'tflite'"):
        check_export("tflite")


def test_half_precision_is_refused_for_onnx(tmp_path):
    if not HAVE_ONNX:
        pytest.skip("the onnx extra is not installed")
    with pytest.raises(ModhifiError, match="float32"):
        export(nn.Linear(3, 2).half(), torch.randn(2, 3), tmp_path / "m.onnx", "onnx")
