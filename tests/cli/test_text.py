"""`modhifi prune` on a tiny language model: calibrated on text or on nothing, pruned twice, repeated by its recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from typer.testing import CliRunner

import modhifi
from modhifi.cli.main import app

runner = CliRunner()


def run(*arguments: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text.save(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny_text.articles(12))
    return f"text:{file}"


def prune(model: Path, out: Path, *more: object) -> dict[str, Any]:
    code, stdout, stderr = run("prune", model, "--out", out, "--window", 32, "--json", *more)
    assert code == 0, stderr
    report: dict[str, Any] = json.loads(stdout)
    return report


@pytest.mark.slow
def test_text_in_uniform_layout_then_again(model: Path, text: str, tmp_path: Path) -> None:
    report = prune(model, tmp_path / "one", "--data", text, "--ratio", 0.25, "--only", "neurons")
    assert [g["kept"] for g in report["groups"]] == [18, 18]
    rows = {row["name"]: row for row in report["before_after"]}
    assert rows["perplexity"]["after"] > 1 and rows["perplexity"]["before"] > 1
    assert rows["next-token agreement with the original"]["after"] < 1
    assert "on a CPU 64 windows of 32 tokens calibrate" in report["warnings"][0]
    assert "0.5 of the mass is text that the model writes itself; --only-this-data leaves it out" in report["warnings"]
    assert report["settings"]["data"]["source"] == [text, "self"] and len(report["errors"]["sources"]) == 2
    assert report["settings"]["method"]["layout"] == "uniform" and report["settings"]["data"]["samples"] == 64
    small = modhifi.load(tmp_path / "one")
    assert small.model.layers[1].mlp.up_proj.weight.shape == (18, 16) and small.dtype == torch.bfloat16
    code, stdout, stderr = run(
        "prune",
        tmp_path / "one",
        "--data",
        text,
        "--window",
        32,
        "--ratio",
        0.3333,
        "--only",
        "neurons",
        "--dry-run",
        "--json",
    )
    assert code == 0 and [g["kept"] for g in json.loads(stdout)["groups"]] == [12, 12], stderr
    code, stdout, stderr = run("prune", "--recipe", tmp_path / "one" / "recipe.yaml", "--dry-run", "--json")
    again, first = json.loads(stdout), json.loads((tmp_path / "one" / "modhifi.json").read_text())
    assert code == 0 and again["settings"] | {"out": None} == first["recipe"] | {"out": None}, stderr
    assert again["plan"]["kept"] == {g["name"]: g["kept"] for g in first["groups"]}


def test_nothing_but_the_model(model: Path) -> None:
    arguments = ("--layout", "global", "--ratio", 0.25, "--only", "neurons", "--samples", 12, "--window", 32)
    code, stdout, stderr = run("prune", model, *arguments, "--dry-run", "--json")
    report = json.loads(stdout)
    assert code == 0 and report["data"]["calibration"].startswith(
        "12 of: self, 28 windows of 32 tokens, 14 written from"
    )
    assert sum(g["kept"] for g in report["groups"]) == pytest.approx(36, abs=1)
    code, stdout, stderr = run("score", model, "--samples", 8, "--window", 16, "--data", "self", "--json")
    assert code == 0 and len(json.loads(stdout)) == 4, stderr


def test_bad_input(model: Path, text: str, tmp_path: Path) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--data", text, "--window", 4096, "--ratio", 0.2), "takes 64 at most"),
        (("--data", f"text:{tmp_path}/none.txt", "--ratio", 0.2), "no text at"),
        (("--data", text, "--ratio", 0.999), "no allocation keeps only 0.001x"),
    ]
    for arguments, message in cases:
        code, _, stderr = run("prune", model, "--out", tmp_path / "out", "--quiet", *arguments)
        assert code == 2 and message in " ".join(stderr.split()), (arguments, stderr)


def test_check_and_prune_count_groups_alike(model: Path, text: str) -> None:
    _, checked, _ = run("check", model)
    (count,) = re.findall(r"\d+ groups can be pruned, \d+ cannot", checked)
    few = ["--samples", 4, "--evaluation-samples", 4, "--window", 16, "--only-this-data", "--no-cache"]
    code, pruned, stderr = run("prune", model, "--data", text, "--ratio", 0.5, "--dry-run", *few)
    assert code == 0, stderr
    assert count in pruned and not count.endswith(" 0 cannot")
