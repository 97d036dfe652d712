"""Transformers whose layers differ in width, loaded by transformers alone with the code in their directory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import tiny_transformers
import torch
import transformers
from safetensors.torch import save_file

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
