from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_transformers
import torch
import transformers
from safetensors.torch import save_file

from modhifi.artifacts.save import save_artifact
from modhifi.models.artifact import load
from modhifi.models.load import load_model
from modhifi.pruning.stages import find_structure
from modhifi.runs.check import check_model
from modhifi.structure.families import restate
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink
from modhifi.structure.tracing.tracer import trace

# loads with transformers alone: the import of modhifi fails
STOCK = """
import sys
sys.modules["modhifi"] = None
import torch, transformers
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype="auto").eval()
    given = load_file(folder + "/given.safetensors")
    with torch.inference_mode():
        print(torch.equal(model(given["batch"]).logits, given["logits"]), model.dtype)
"""


STOCK_TIMM = """
import sys
sys.modules["modhifi"] = None
import timm, torch
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    given = load_file(folder + "/given.safetensors")
    with torch.inference_mode():
        print(torch.equal(model(given["batch"]), given["logits"]))
"""


def uniform(name: str, kinds: tuple[str, ...], folder: Path) -> torch.nn.Module:
    """Prune every group of some kinds to half, save the artefact and what the model says about a batch."""
    model, batch, run = tiny_transformers.family(name)
    model.float()
    if name == "llama":  # as a checkpoint in bfloat16 is loaded: its rotary frequencies stay float32
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    batch = batch.to(next(model.parameters()).dtype) if batch.is_floating_point() else batch

    def one(model: torch.nn.Module) -> torch.Tensor:
        return model(batch) if name in tiny_transformers.TIMM else model(batch).logits

    structure = trace(model, one)
    loaded = load_model(model)
    plan = Plan({g.name: tuple(range(0, g.n, 2)) for g in structure.prunable if g.kind in kinds})
    small = shrink(copy.deepcopy(model), structure, plan)
    save_artifact(folder, small, loaded, structure, plan, manifest={"task": "prune"}, recipe={}, report={})
    with torch.inference_mode():
        logits = one(small)
        assert torch.equal(one(load(folder)), logits)
    save_file({"batch": batch, "logits": logits}, folder / "given.safetensors")
    return small


BOTH, NEURONS = ("heads", "neurons"), ("neurons",)
UNIFORM = {
    "llama": BOTH,
    "llama, tied": BOTH,
    "qwen3": BOTH,
    "gemma3": BOTH,
    "phi3": BOTH,
    "vit": BOTH,
    "gpt2": NEURONS,
    "opt": NEURONS,
    "bert": NEURONS,
    "distilbert": NEURONS,
    "gpt_neox": NEURONS,
    "swin": NEURONS,
}


@pytest.mark.parametrize("name", ["llama", "llama, tied", "vit", "gpt2", "bert"])
def test_a_uniform_artefact_loads_while_modhifi_cannot_be_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    uniform(name, UNIFORM[name], tmp_path / "out")
    monkeypatch.setitem(sys.modules, "modhifi", None)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "out")])
    exec(STOCK, {})
    assert capsys.readouterr().out == f"True torch.{'bfloat16' if name == 'llama' else 'float32'}\n"


@pytest.mark.slow
def test_uniform_artefacts_load_with_transformers_alone(tmp_path: Path):
    folders = []
    for name, kinds in UNIFORM.items():
        folders.append(str(tmp_path / name.replace(", ", "-")))
        uniform(name, kinds, Path(folders[-1]))
    run = subprocess.run([sys.executable, "-c", STOCK, *folders], capture_output=True, text=True)
    found = dict(zip(UNIFORM, run.stdout.splitlines(), strict=False))
    expected = dict.fromkeys(UNIFORM, "True torch.float32") | {"llama": "True torch.bfloat16"}
    assert found == expected, run.stderr[-2000:]


@pytest.mark.slow
def test_uniform_artefacts_of_timm_load_with_timm_alone(tmp_path: Path):
    names = [name for name in tiny_transformers.TIMM if name != "convnext_atto"]
    for name in names:
        uniform(name, ("neurons",), tmp_path / name)
        assert "timm.create_model" in (tmp_path / name / "README.md").read_text()
    folders = [str(tmp_path / name) for name in names]
    run = subprocess.run([sys.executable, "-c", STOCK_TIMM, *folders], capture_output=True, text=True)
    assert run.stdout.split() == ["True"] * len(names), run.stderr[-2000:]


SHARED = [name for name, (_, _, fields) in tiny_transformers.FAMILIES.items() if "num_key_value_heads" in fields]


@pytest.mark.parametrize("kinds", [("heads",), ("neurons",)])
@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("name", SHARED)
def test_any_number_of_key_value_heads_is_said_as_it_is(name: str, kv: int, kinds: tuple[str, ...], tmp_path: Path):
    """Multi-query and grouped attention, cut to numbers of heads that divide the width and that do not."""
    kind, config, fields = tiny_transformers.FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**fields | {"num_key_value_heads": kv}))
    loaded = load_model(tiny_transformers.livelier(model.requires_grad_(False)))
    structure = find_structure(loaded)
    groups = [g for g in structure.prunable if g.kind in kinds]
    if not groups:
        assert (name, kv) in {("gemma2", 1), ("phi3", 1)}
    padded = loaded.example.clone()
    padded[0, -3:] = -1
    for count in {1, groups[0].n // groups[0].step - 1} if groups else ():
        each = {g.name: g.n // g.experts for g in groups}
        plan = Plan({g.name: tuple(i for i in range(g.n) if i % each[g.name] < count * g.multiple) for g in groups})
        small = shrink(copy.deepcopy(loaded.model), structure, plan)
        folder = tmp_path / str(count)
        save_artifact(folder, small, loaded, structure, plan, manifest={}, recipe={}, report={})
        if kinds == ("neurons",) or kv == 1:
            assert small.config.num_key_value_heads == kv
        entry = json.loads((folder / "modhifi.json").read_text())["model"]
        auto = getattr(transformers, entry["stock"] or entry["remote"])
        alone = auto.from_pretrained(folder, dtype="auto", trust_remote_code=entry["stock"] is None)
        assert entry["stock"] or (kinds == ("heads",) and 32 % (count * groups[0].queries))
        for batch in (loaded.example, padded):
            expected = loaded.logits(batch, small)
            assert torch.equal(loaded.logits(batch, load(folder)), expected)
            assert torch.allclose(loaded.logits(batch, alone.eval()), expected, rtol=1e-5, atol=1e-6)


def test_a_ratio_gives_every_width_to_the_last_neuron():
    model, example, _ = tiny_transformers.family("vit_tiny_patch16_224")
    structure = trace(model, lambda m: m(example))
    dim, off = 49, [w for w in range(1, 196) if int(49 * (w / 49)) != w]
    for width in off:
        for block in model.blocks:
            block.mlp.fc1 = torch.nn.Linear(dim, width)
        restate(model, structure)
        assert int(dim * model._model_args["mlp_ratio"]) == width
    model.blocks[0].mlp.fc1 = torch.nn.Linear(dim, 7)
    before = model._model_args
    restate(model, structure)
    assert off and model._model_args is before  # layers that differ have no common ratio


def test_the_fields_that_converters_read(tmp_path: Path):
    config = uniform("mistral", ("heads", "neurons"), tmp_path / "out").config
    names = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    assert [getattr(config, name) for name in names] == [20, 2, 1, 6, 32]


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "vit_tiny_patch16_224", "convnext_atto"])
def test_what_a_configuration_cannot_say_comes_back_with_modhifi(name: str, tmp_path: Path):
    uniform(name, ("heads", "neurons", "channels"), tmp_path / "out")
    assert "modhifi.load" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("gpt2", ["heads"]),
        ("llama", []),
        ("dinov2", []),
        ("vit_tiny_patch16_224", ["heads"]),
        ("beit_base_patch16_224", []),
    ],
)
def test_check_tells_what_the_stock_configuration_cannot_say(name: str, kinds: list[str]):
    model, _, _ = tiny_transformers.family(name)
    assert check_model(load_model(model.float()))["not_stock"] == kinds
