"""`modhifi check` and `prune` on saved models that read sounds, series or several inputs, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_parts
import tiny_transformers
import torch
import transformers
from typer.testing import CliRunner

import modhifi
from modhifi.cli.main import app
from modhifi.models.load import load_model

runner = CliRunner()
SOURCES = {
    "t5": "pairs:{0}/texts.tsv",
    "bart": "synthetic",
    "whisper": "synthetic",
    "wav2vec2": "audio:{0}/sounds",
    "ast": "synthetic",
    "clip": "images:{0}/pictures",
    "llava": "images:{0}/pictures",
    "smolvlm": "synthetic",
    "detr": "images:{0}/pictures",
    "patchtst": "synthetic",
}
ROWS = {"wav2vec2": "transcript agreement (CTC)", "clip": "cosine of text embeddings", "detr": "box overlap (IoU)"}


def run(*arguments: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def data(place: Path) -> Path:
    tiny_parts.sounds(place / "sounds", 12)
    tiny_parts.pictures(place / "pictures", 12)
    words = tiny_parts.tiny_text.WORDS
    lines = [" ".join(words[(7 * i + j * j) % len(words)] for j in range(3 + i % 4)) for i in range(40)]
    (place / "texts.tsv").write_text("\n".join(f"{a}\t{b}" for a, b in zip(lines, lines[::-1], strict=True)))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_parts.MODELS)
def test_prune_and_load_again(name: str, tmp_path: Path) -> None:
    saved = tiny_parts.save(name, tmp_path / "model")
    sizes = ["--samples", 8, "--evaluation-samples", 4, "--walked", 0, "--ratio", 0.3, "--quiet", "--json"]
    source = SOURCES[name].format(data(tmp_path))
    code, stdout, stderr = run("prune", saved, "--data", source, "--out", tmp_path / "small", *sizes)
    assert code == 0, stderr
    report = json.loads(stdout)
    before, after = report["size"]["parameters"]
    assert after < 0.95 * before and report["size"]["flops"][1] < report["size"]["flops"][0]
    # Features and forecasts are values, of which a share is kept; all others say the same as often.
    kept = report["errors"]["explained" if report["values"] else "agreement"]
    assert 0 <= kept <= 1
    assert name not in ROWS or any(row["name"].startswith(ROWS[name]) for row in report["before_after"])
    again = modhifi.load(tmp_path / "small")
    assert type(again) is type(load_model(saved).model) and sum(p.numel() for p in again.parameters()) == after


def mixtral(directory: Path) -> Path:
    tiny_transformers.family("mixtral")[0].float().save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whisper", "t5", "clip", "detr", "smolvlm", "mixtral"])
def test_the_library_loads_the_result_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    saved = mixtral(tmp_path / "model") if name == "mixtral" else tiny_parts.save(name, tmp_path / "model")
    only = "model.*fc1" if name == "detr" else "neurons"  # its head of boxes is as wide as the model
    sizes = ["--samples", 8, "--evaluation-samples", 4, "--walked", 0, "--only", only, "--ratio", 0.5, "--quiet"]
    code, _, stderr = run("prune", saved, "--out", tmp_path / "small", *sizes)
    assert code == 0, stderr
    auto = json.loads((tmp_path / "small" / "modhifi.json").read_text())["model"]["stock"]
    theirs = getattr(transformers, auto).from_pretrained(tmp_path / "small").eval()
    loaded = load_model(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(loaded.logits(loaded.example), loaded.logits(loaded.example, theirs))


def test_check_of_a_model_whose_norms_forbid_every_width(tmp_path: Path) -> None:
    sizes = dict(tiny_transformers.TEXT, num_key_value_heads=4)
    transformers.BitNetForCausalLM(transformers.BitNetConfig(**sizes)).save_pretrained(tmp_path)
    code, stdout, _ = run("check", tmp_path)
    assert code == 0 and "an RMSNorm normalises across these channels" in stdout
    assert "blocks and sublayers go where --only" in stdout and "loads afterwards" not in stdout


@pytest.mark.parametrize("name", ["whisper", "smolvlm"])
def test_check_lists_what_can_be_cut(name: str, tmp_path: Path) -> None:
    code, stdout, stderr = run("check", tiny_parts.save(name, tmp_path / "model"), "--json")
    assert code == 0, stderr
    assert {group["kind"] for group in json.loads(stdout)["groups"]} >= {"neurons"}
