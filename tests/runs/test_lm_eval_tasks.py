"""lm-eval's tasks before and after: its results as rows, one clear line where they cannot be had."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from typer.testing import CliRunner

from modhifi.cli.main import app
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.runs.lm_eval_tasks import TaskRow, compare_tasks

WORDS = tiny_text.WORDS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoadedModel]:
    return tuple(load_model(tiny_text.save(tmp_path_factory.mktemp("m"), hidden_size=s)) for s in (16, 32))  # type: ignore[return-value]


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with lm-eval's names and the shape of its results."""

    class Manager:
        def __init__(self, include_path: str | None) -> None: ...

        def match_tasks(self, names: list[str]) -> list[str]:
            return [n for n in names if n == "words"]

    def evaluate(model: Any, tasks: list[str], limit: int | None, **_: Any) -> dict[str, Any]:
        width = model["pretrained"].config.hidden_size
        found = {
            "alias": "words",
            "acc,none": width / 64,
            "acc_stderr,none": 0.1,
            "em,strict": 1,
            "em_stderr,strict": "N/A",
        }
        return {"results": {"words": found}, "n-samples": {"words": {"original": 9, "effective": limit or 9}}}

    for name, content in {
        "lm_eval": dict(simple_evaluate=evaluate),
        "lm_eval.models": {},
        "lm_eval.models.huggingface": dict(HFLM=lambda **given: given),
        "lm_eval.tasks": dict(TaskManager=Manager),
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_metrics_become_rows(models: tuple[LoadedModel, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    assert compare_tasks(*models, ["words"], limit=5) == (
        TaskRow("words", "acc", 5, 0.25, 0.5, 0.1, 0.1),
        TaskRow("words", "em (strict)", 5, 1.0, 1.0, None, None),
    )


def test_what_cannot_be_run_is_one_line(
    models: tuple[LoadedModel, LoadedModel], monkeypatch: pytest.MonkeyPatch, model_dir: Path
) -> None:
    stand_in(monkeypatch)
    with pytest.raises(ModhifiError, match="lm-eval knows no task 'nothing'"):
        compare_tasks(*models, ["words", "nothing"])
    with pytest.raises(ModhifiError, match="no causal language model with a tokenizer"):
        compare_tasks(models[0], load_model(model_dir), ["words"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModhifiError, match=r"pip install 'modhifi\[lm-eval\]'"):
        compare_tasks(*models, ["words"])


def test_the_verb_prints_before_and_after(
    models: tuple[LoadedModel, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    edited, against = models[1].source, models[0].source
    found = CliRunner().invoke(app, ["tasks", edited, "--against", against, "--task", "words", "--json"])
    row = json.loads(found.stdout)["rows"][0]
    assert (row["task"], row["n"], row["before"], row["after"]) == ("words", 9, 0.25, 0.5)


def test_lm_eval_itself(models: tuple[LoadedModel, LoadedModel], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    documents = [{"text": tiny_text.write(i, 12), "label": i % 2} for i in range(6)]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "next_word.yaml").write_text(
        f"""task: next_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/documents.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: [{WORDS[0]}, {WORDS[1]}]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
    )
    rows = compare_tasks(*models, ["next_word"], limit=5, include=tmp_path)
    (accuracy,) = [row for row in rows if row.metric == "acc"]
    expected = []
    for loaded in models:
        right = 0
        for document in documents[:5]:
            tokens = torch.tensor([loaded.tokenizer(document["text"])["input_ids"]])
            with torch.no_grad():
                last = loaded.logits(tokens)[0, -1]
            choices = [last[loaded.tokenizer.convert_tokens_to_ids(word)] for word in WORDS[:2]]
            right += int(choices[1] > choices[0]) == document["label"]
        expected.append(right / 5)
    assert [accuracy.before, accuracy.after] == pytest.approx(expected) and accuracy.n == 5
