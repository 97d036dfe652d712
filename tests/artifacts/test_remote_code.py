"""Transformers whose layers differ in width, loaded by transformers alone with the code in their directory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_transformers
import torch
import transformers
from safetensors.torch import load_file, save_file

from modhifi.artifacts import save as save_module
from modhifi.artifacts.save import save_artifact
from modhifi.models.artifact import load_artifact
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.stages import find_structure
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink

ALONE = """
import sys
sys.modules["modhifi"] = None
import torch, transformers
from safetensors.torch import load_file
for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    kind = getattr(transformers, auto)
    model = kind.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
    given = load_file(folder + "/given.safetensors")
    with torch.inference_mode():
        print(torch.equal(model(given["batch"]).logits, given["logits"]), type(model).__name__)
"""


def uneven(
    loaded: LoadedModel, folder: Path, kinds: tuple[str, ...] = ("neurons", "heads"), first: int = 1
) -> LoadedModel:
    """Every group loses one component more than the one before it, the first one ``first``."""
    structure = find_structure(loaded)
    groups = [g for g in structure.prunable if g.kind in kinds]
    plan = Plan({g.name: tuple(range(i, g.n)) for i, g in enumerate(groups, first) if 0 < i < g.n})
    small = shrink(copy.deepcopy(loaded.model), structure, plan)
    save_artifact(folder, small, loaded, structure, plan, manifest={"task": "prune"}, recipe={}, report={})
    with torch.inference_mode():
        logits = loaded.logits(loaded.example, small)
    save_file({"batch": loaded.example, "logits": logits}, folder / "given.safetensors")
    return load_artifact(folder)


@pytest.mark.slow
def test_uneven_layers_load_with_the_code_in_their_directory(tmp_path: Path):
    arguments, expected = list[str](), list[str]()
    for name in ("llama, tied", "gpt2", "dinov2"):
        loaded = load_model(tiny_transformers.family(name)[0].float())
        once, twice = tmp_path / f"{name[:5]}-once", tmp_path / f"{name[:5]}-twice"
        uneven(uneven(loaded, once), twice, ("neurons",))  # what the code reads is replaced, not added to
        manifest = json.loads((once / "modhifi.json").read_text())["model"]
        assert manifest["stock"] is None and "trust_remote_code=True" in (once / "README.md").read_text()
        arguments += [str(once), manifest["remote"], str(twice), manifest["remote"]]
        expected += [f"True {type(loaded.model).__name__}"] * 2
    run = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines() == expected, run.stderr[-2000:]


def test_the_code_goes_where_the_configuration_says_all(tmp_path: Path):
    loaded = load_model(tiny_transformers.family("llama, tied")[0].float())
    again = uneven(loaded, tmp_path / "uneven", ("neurons",), first=0)
    structure = find_structure(again)
    narrow = Plan({g.name: tuple(range(8)) for g in structure.prunable if g.kind == "neurons"})
    small = shrink(copy.deepcopy(again.model), structure, narrow)
    folder = tmp_path / "even"
    save_artifact(folder, small, again, structure, narrow, manifest={"task": "prune"}, recipe={}, report={})
    assert (tmp_path / "uneven" / "modeling_modhifi.py").is_file() and not (folder / "modeling_modhifi.py").exists()
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config and "modhifi" not in config


def test_heads_that_do_not_divide_the_hidden_size_fall_back_to_the_code(tmp_path: Path):
    shape = tiny_transformers.GROUPED | dict(num_attention_heads=8, num_key_value_heads=4)
    torch.manual_seed(0)
    loaded = load_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)))
    structure = find_structure(loaded)
    plan = Plan({g.name: (0, 1, 3) for g in structure.prunable if g.kind == "heads"})  # 6 heads, of 32 channels
    small = shrink(copy.deepcopy(loaded.model), structure, plan)
    save_artifact(tmp_path / "out", small, loaded, structure, plan, manifest={}, recipe={}, report={})
    model = json.loads((tmp_path / "out" / "modhifi.json").read_text())["model"]
    assert (model["stock"], model["remote"]) == (None, "AutoModelForCausalLM")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "modhifi.load" in card and "trust_remote_code=True" in card
    expected = loaded.logits(loaded.example, small)
    assert torch.equal(load_artifact(tmp_path / "out").logits(loaded.example), expected)


def saved_unevenly(loaded: LoadedModel, folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """The manifest's entry on the model, the card and the configuration of an artefact with uneven layers."""
    again = uneven(loaded, folder, ("neurons", "channels"))
    logits = load_file(folder / "given.safetensors")["logits"]
    assert torch.equal(again.logits(loaded.example), logits)
    entry = json.loads((folder / "modhifi.json").read_text())["model"]
    return entry, (folder / "README.md").read_text(), json.loads((folder / "config.json").read_text())


def test_code_that_does_not_give_the_model_back_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """transformers leaves a buffer of this family empty that no weight file holds."""
    sizes = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
    torch.manual_seed(0)
    model = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**tiny_transformers.GROUPED, **sizes))
    entry, card, config = saved_unevenly(load_model(model), tmp_path / "out")
    assert entry["stock"] is None and entry["remote"] is None and "logits" in entry["not_alone"]
    assert "auto_map" not in config and "modhifi" not in config and not (tmp_path / "out/modeling_modhifi.py").exists()
    assert "Not with transformers alone" in card and "trust_remote_code" not in card and "modhifi.load" in card
    told = [record.getMessage() for record in caplog.records if record.name.startswith("modhifi")]
    assert len(told) == 1 and told[0].startswith("only modhifi.load loads module:FalconH1ForCausalLM")


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_class_that_does_not_give_the_model_back_is_not_named(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path
):
    monkeypatch.setattr(save_module, "is_stock", lambda *_: True)
    model = str(model_dir) if library == "timm" else tiny_transformers.family("llama, tied")[0].float()
    entry, card, _ = saved_unevenly(load_model(model), tmp_path / "out")
    assert entry["stock"] is None and entry["remote"] is None and "fails in a fresh process" in entry["not_alone"]
    assert f"Not with {library} alone" in card and "modhifi.load" in card
    assert "from_pretrained" not in card and "create_model" not in card


def test_every_output_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load_model(tiny_transformers.family("llama, tied")[0].float())

    def outputs(self: LoadedModel, batch: torch.Tensor, model: object = None) -> dict[str, torch.Tensor]:
        logits = self.logits(batch, model)
        return {"logits": logits, "second": logits + 1}

    monkeypatch.setattr(LoadedModel, "outputs", outputs)
    entry, _, _ = saved_unevenly(loaded, tmp_path / "out")
    assert entry["remote"] is None and "instead of logits, second" in entry["not_alone"]
