from __future__ import annotations

import copy
import errno
import importlib
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny_text
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn

import modhifi
from modhifi.artifacts import report
from modhifi.artifacts import save as save_module
from modhifi.artifacts.model_card import model_card
from modhifi.artifacts.reload_check import ALIGNED, _align, compare_outputs, verify_reload
from modhifi.artifacts.save import save_artifact
from modhifi.data.samples import Samples, describe_data
from modhifi.disk import check_output
from modhifi.errors import ModhifiError, SelfTestFailed
from modhifi.models.artifact import load_artifact
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import ForgottenClass, Manifest, read_manifest
from modhifi.models.weights import state_hash
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink
from modhifi.structure.tracing.tracer import trace

REPORT = {
    "schema_version": 1,
    "title": "tiny",
    "verdicts": [{"name": "error", "verdict": "PASS-ON-SAMPLES", "text": None}],
    "before_after": [{"name": "Accuracy", "before": 0.9, "after": 0.8, "unit": "%"}],
}
RESNET = {"channels": (8, 16, 16, 16), "stem_width": 8, "num_classes": 5}


def tiny(name: str = "resnet18", **args: Any) -> LoadedModel:
    loaded = load_model(f"timm:{name}", pretrained=False, model_args=args or RESNET)
    # Statistics other than a fresh model's, so that every tensor of the file matters.
    torch.manual_seed(1)
    for module in loaded.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return replace(loaded, example=pixels)


def prune(loaded: LoadedModel, share: float = 0.5) -> tuple[nn.Module, Structure, Plan]:
    """Every prunable group loses its first components, equally many in every part."""
    structure = trace(loaded.model, lambda m: m(loaded.example))
    kept = {}
    for g in structure.prunable:
        labels = torch.zeros(g.n, dtype=torch.int64) if g.partition is None else g.partition
        parts = [torch.nonzero(labels == label).flatten().tolist() for label in labels.unique()]
        kept[g.name] = tuple(sorted(i for part in parts for i in part[min(int(share * len(part)), len(part) - 1) :]))
    plan = Plan(kept)
    return shrink(copy.deepcopy(loaded.model), structure, plan), structure, plan


def save(out: Path, loaded: LoadedModel, edited: nn.Module, structure=None, plan=None, **more: Any) -> Path:
    given: dict[str, Any] = {"manifest": {"task": "prune", "seed": 0}, "recipe": {"model": loaded.source}}
    given["report"] = REPORT
    return save_artifact(out, edited, loaded, structure, plan, **(given | more))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, LoadedModel, nn.Module]:
    loaded = tiny()
    edited, structure, plan = prune(loaded)
    out = save(tmp_path_factory.mktemp("artefacts") / "half", loaded, edited, structure, plan)
    return out, loaded, edited


def intact(directory: Path) -> bool:
    artifact = load_artifact(directory).artifact
    return artifact is not None and artifact.intact


def counts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    names = ("in_channels", "out_channels", "groups", "num_features", "in_features", "out_features")
    return {n: tuple(getattr(m, a, 0) for a in names) for n, m in model.named_modules() if hasattr(m, "weight")}


def test_a_fresh_process_gives_the_same_bits(saved):
    out, loaded, edited = saved
    assert sum(p.numel() for p in edited.parameters()) < 0.6 * sum(p.numel() for p in loaded.model.parameters())
    verify_reload(out, loaded.example, loaded.outputs(loaded.example, edited))


def test_weights_that_begin_anywhere_in_a_file_round_as_others_do():
    layer = nn.Linear(24, 17)
    storage = torch.empty(24 * 17 + 1)
    storage[1:] = layer.weight.detach().flatten()
    layer.weight.data = storage[1:].view(17, 24)
    assert layer.weight.data_ptr() % ALIGNED
    before = layer.weight.detach().clone()
    _align(layer)
    assert not layer.weight.data_ptr() % ALIGNED and torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", ["", "boxes.0"])
def test_a_difference_of_any_output_is_told(name):
    def told(output, expected):
        first = {"logits": torch.ones(3, dtype=torch.float64)}
        return compare_outputs(first | {name: output}, first | {name: expected})

    where = f"output '{name}': " if name else ""
    nans = torch.tensor([1.0, math.nan])
    assert told(torch.zeros(2), torch.zeros(2)) == told(nans, nans.clone()) == ""
    assert told(torch.zeros(2), torch.ones(2)) == f"{where}it differs by 1 of its norm"
    assert told(nans, torch.ones(2)) == f"{where}it differs by nan of its norm"
    assert told(torch.zeros(2), torch.zeros(3)) == f"{where}torch.float32 (2,) instead of torch.float32 (3,)"
    assert told(torch.zeros(2).int(), torch.zeros(2)) == f"{where}torch.int32 (2,) instead of torch.float32 (2,)"
    assert compare_outputs({"a": nans}, {"a": nans, "b": nans}) == "it returns a instead of a, b"


class Two(nn.Module):
    """Hands out its features beside its scores."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x):
        features = self.down(self.up(x).relu())
        return {"scores": self.head(features.relu()), "more": [features, features[:, :2]]}


def test_reload_compares_every_output(tmp_path):
    torch.manual_seed(0)
    module = Two()
    loaded = load_model(module, example=torch.randn(2, 6))
    edited, structure, plan = prune(loaded)
    out = save(tmp_path / "a", loaded, edited, structure, plan)
    expected = loaded.outputs(loaded.example, edited)
    assert list(expected) == ["scores", "more.0", "more.1"]
    verify_reload(out, loaded.example, expected, skeleton=module)
    for name in expected:
        other = expected | {name: expected[name] * 1.5}
        with pytest.raises(SelfTestFailed, match=f"output '{name}': it differs by 0.333 of its norm"):
            verify_reload(out, loaded.example, other, skeleton=module)


def test_the_manifest_names_all_that_was_written(saved, tmp_path):
    out = save(tmp_path / "a", saved[1], saved[2], log="x")
    written = json.loads((out / "modhifi.json").read_text())["written"]
    assert written == sorted(p.name for p in out.iterdir()) and "modhifi.log" in written
    check_output(out, force=True)
    (out / "model.bin").write_text("x")
    (out / "tokenizer.json").write_text("{}")  # a name that an artefact may have, this one not
    with pytest.raises(ModhifiError, match="which modhifi did not write"):
        check_output(out, force=True)


def test_load_gives_a_plain_frozen_module_with_the_right_counts(saved):
    out, _, edited = saved
    model = modhifi.load(out)
    assert type(model) is type(edited) and not model.training and not any(p.requires_grad for p in model.parameters())
    assert counts(model) == counts(edited)
    assert state_hash(model) == state_hash(edited)


def test_loading_by_directory_describes_the_model(saved):
    out, loaded, _ = saved
    again = load_model(out)
    assert (again.source, again.framework, again.kind) == (str(out), "timm", "image")
    assert again.info["model_args"] == loaded.info["model_args"]
    assert again.info["pretrained_cfg"]["mean"] == loaded.info["pretrained_cfg"]["mean"]
    assert (
        again.artifact is not None
        and again.artifact.manifest.base.source == "timm:resnet18"
        and again.info["notes"] == []
    )


def test_the_directory_holds_what_it_should(saved):
    out, loaded, edited = saved
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "modhifi.json",
        "recipe.yaml",
        "report.html",
        "report.json",
    ]
    manifest = read_manifest(out)
    assert manifest.schema_version == 1 and manifest.task == "prune" and manifest.model_extra["seed"] == 0
    assert manifest.base.sha256 == state_hash(loaded.model) != state_hash(edited)
    assert all(len(g.kept) < g.n for g in manifest.groups) and len(manifest.groups) > 8
    assert manifest.versions["torch"]
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == {"model": "timm:resnet18"}
    assert json.loads((out / "report.json").read_text())["title"] == "tiny"
    assert "PASS-ON-SAMPLES" in (out / "report.html").read_text()
    # readable by others as any new directory is, though it was filled in a private one
    fresh = out.parent / "fresh"
    fresh.mkdir()
    assert out.stat().st_mode == fresh.stat().st_mode
    (fresh / "file").touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {(fresh / "file").stat().st_mode}


def test_the_card_has_valid_metadata_and_a_snippet_that_runs(saved, monkeypatch):
    out, _, _ = saved
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "modhifi" and card.data.pipeline_tag == "image-classification"
    assert {"modhifi", "pruned", "timm"} <= set(card.data.tags) and card.data.base_model is None
    assert "| Accuracy | 90.00 % | 80.00 % | −10.00 points |" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.S)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code, names)
    assert not names["model"].training


def test_card_names_base_model_and_licence(tmp_path):
    loaded = tiny()
    loaded.info.update(repository="timm/resnet18.a1_in1k", revision="f" * 40, licence="Some Licence 1.0")
    out = save(tmp_path / "a", loaded, copy.deepcopy(loaded.model))
    data = ModelCard.load(out / "README.md").data
    assert (data.base_model, data.license, data.license_name) == ("timm/resnet18.a1_in1k", "other", "Some Licence 1.0")
    again = load_artifact(out)
    assert (again.info["revision"], again.info["licence"]) == ("f" * 40, "Some Licence 1.0")


def test_the_card_of_a_language_model_says_what_its_text_becomes(tmp_path):
    loaded = load_model(tiny_text.save(tmp_path / "model"))
    card = (save(tmp_path / "a", loaded, copy.deepcopy(loaded.model)) / "README.md").read_text()
    sentence = (
        'tokenizer beside the weights (`AutoTokenizer.from_pretrained(".")`); a vocabulary of 51; at most 64 at once.'
    )
    assert f"Text: tokens of the {sentence}" in card


def test_the_card_names_data_and_files_but_no_place_on_disk(saved):
    out, _, _ = saved
    content = json.loads((out / "modhifi.json").read_text())
    content["base"]["source"] = "/home/me/models/net"
    content["calibration"] = {"description": "images:/home/me/pictures/cats, 3 of 4 images"}
    card = model_card("small", Manifest.model_validate(content), {"settings": {"export": ["onnx"]}})
    assert "from `net`" in card and "images:cats, 3 of 4 images" in card and "/home" not in card
    assert "Its licence is not recorded here" in card
    content["calibration"] = {"description": "8 of: self, 12 windows of 128 tokens"}
    assert "licence is not" not in model_card("small", Manifest.model_validate(content), {})
    assert "`model.onnx`" in card and "Intended use" in card and "standard deviation" in card
    assert "`model.safetensors`: weights" in card and "\\[" not in card


def test_stock_timm_refuses_rather_than_loads_something_else(saved):
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model(f"local-dir:{saved[0]}", pretrained=True)


def test_pruning_an_artefact_again_composes(saved, tmp_path):
    out, _, _ = saved
    first = load_model(out)
    first = replace(first, example=torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    edited, structure, plan = prune(first, 0.25)
    second = save(tmp_path / "again", first, edited, structure, plan)
    assert torch.equal(load_artifact(second).logits(first.example), first.logits(first.example, edited))
    base = read_manifest(second).base
    assert base.source == "timm:resnet18" and base.sha256 == read_manifest(out).base.sha256
    assert [edit["source"] for edit in base.edits_before] == [str(out)] and not read_manifest(second).forgotten


def test_classes_that_were_forgotten_are_gone_from_what_is_made_of_a_model(saved, tmp_path):
    first = load_model(saved[0])
    forgotten = (ForgottenClass(index=1, name="cat"),)
    first = replace(
        first,
        artifact=replace(first.artifact, manifest=first.artifact.manifest.model_copy(update={"forgotten": forgotten})),
    )
    edited, structure, plan = prune(first, 0.25)
    assert read_manifest(save(tmp_path / "again", first, edited, structure, plan)).forgotten == forgotten


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilenetv3_small_050", {"num_classes": 4}),
        ("resnext50_32x4d", {"layers": (1, 1, 1, 1), "cardinality": 4, "base_width": 8, "num_classes": 3}),
        ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}),
    ],
)
def test_other_architectures(name, args, tmp_path):
    loaded = tiny(name, **args)
    edited, structure, plan = prune(loaded)
    assert plan.kept
    out = save(tmp_path / "a", loaded, edited, structure, plan)
    again = load_artifact(out)
    assert torch.equal(again.logits(loaded.example), loaded.logits(loaded.example, edited))
    assert counts(again.model) == counts(edited)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("shift", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return self.down(self.up(x).relu()) + self.shift


def test_timm_does_not_warn_of_the_means_of_one_channel(tmp_path, caplog):
    loaded = load_model("timm:resnet18", pretrained=False, model_args=RESNET | {"in_chans": 1})
    caplog.clear()
    path = save(tmp_path / "one", loaded, loaded.model)
    assert not [record.name for record in caplog.records if record.name.startswith("timm")]
    assert json.loads((path / "config.json").read_text())["pretrained_cfg"]["input_size"][0] == 1


def test_own_module_needs_its_skeleton(tmp_path):
    torch.manual_seed(0)
    module = Own()
    loaded = load_model(module, example=torch.randn(2, 6))
    edited, structure, plan = prune(loaded)
    out = save(tmp_path / "a", loaded, edited, structure, plan)
    with pytest.raises(ModhifiError, match="skeleton="):
        modhifi.load(out)
    again = load_artifact(out, skeleton=module)
    assert module.up.out_features == 8 and again.kind == "tensor" and again.example.shape == (2, 6)
    verify_reload(out, loaded.example, loaded.outputs(loaded.example, edited), skeleton=module)
    edited, structure, plan = prune(again)
    assert edited.up.out_features == 2
    out = save(tmp_path / "b", again, edited, structure, plan)
    reloaded = modhifi.load(out, skeleton=module)
    assert torch.equal(reloaded(loaded.example), edited(loaded.example)) and reloaded.up.out_features == 2


def test_transformers_with_tied_weights_and_uneven_widths(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    loaded = load_model(LlamaForCausalLM(config))
    edited = copy.deepcopy(loaded.model)
    assert cut(edited, [6, 6]).lm_head.weight is edited.model.embed_tokens.weight
    edited.config.intermediate_size = 6
    out = save(tmp_path / "uniform", loaded, edited)
    expected = loaded.logits(loaded.example, edited)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(loaded.example).logits, expected)
    assert ModelCard.load(out / "README.md").data.library_name == "transformers"
    assert "lm_head.weight" not in load_file(out / "model.safetensors")

    again = load_artifact(out)
    assert torch.equal(again.logits(loaded.example), expected)
    assert again.kind == "text" and again.model.lm_head.weight is again.model.model.embed_tokens.weight
    hetero = save(tmp_path / "hetero", again, cut(copy.deepcopy(again.model), [6, 4]))
    assert load_artifact(hetero).model.model.layers[1].mlp.up_proj.out_features == 4
    assert ModelCard.load(hetero / "README.md").data.library_name == "modhifi"
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(hetero)


def cut(model: Any, widths: list[int]) -> Any:
    """Keep the first FFN neurons of every layer."""
    for layer, width in zip(model.model.layers, widths, strict=True):
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight, linear.out_features = nn.Parameter(linear.weight[:width].clone()), width
        down = layer.mlp.down_proj
        down.weight, down.in_features = nn.Parameter(down.weight[:, :width].clone()), width
    return model.eval()


def test_half_precision_keeps_its_dtypes(tmp_path):
    loaded = tiny()
    edited = copy.deepcopy(loaded.model).bfloat16()
    again = load_artifact(save(tmp_path / "a", loaded, edited))
    assert {t.dtype for t in again.model.parameters()} == {torch.bfloat16}
    assert torch.equal(again.logits(loaded.example), loaded.logits(loaded.example, edited))


def test_large_weights_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(save_module, "SHARD", "40KB")
    loaded = tiny()
    out = save(tmp_path / "a", loaded, loaded.model)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1 and not (out / "model.safetensors").exists()
    assert torch.equal(load_artifact(out).logits(loaded.example), loaded.logits(loaded.example)) and intact(out)


def test_changed_weights_are_told(saved, tmp_path):
    out = save(tmp_path / "a", saved[1], saved[2])
    state = load_file(out / "model.safetensors")
    state["fc.bias"] = state["fc.bias"] + 1
    save_file(state, out / "model.safetensors")
    assert intact(saved[0]) and not intact(out)
    assert any("hash differs" in warning for warning in load_artifact(out).warnings)
    with pytest.warns(UserWarning, match="hash differs"):
        modhifi.load(out)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "modhifi.json").unlink(), "no modhifi artefact"),
        (lambda d: (d / "modhifi.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "modhifi.json").write_text('{"schema_version": 99}'), "upgrade modhifi"),
        (lambda d: (d / "model.safetensors").unlink(), "cannot read the weights"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 99), "cannot read the weights"),
    ],
)
def test_damaged_artefacts_are_one_line(saved, tmp_path, damage, message):
    out = save(tmp_path / "a", saved[1], saved[2])
    damage(out)
    with pytest.raises(ModhifiError, match=message) as caught:
        load_artifact(out)
    assert "\n" not in str(caught.value)


def test_a_reload_that_fails_says_why(tmp_path):
    with pytest.raises(SelfTestFailed, match="no modhifi artefact"):
        verify_reload(tmp_path, torch.zeros(1), {"": torch.zeros(1)})


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left"), ValueError("bug")])
def test_a_crash_leaves_nothing(saved, tmp_path, monkeypatch, error):
    def crash(*_: Any) -> None:
        raise error

    old = save(tmp_path / "old", saved[1], saved[2])
    before = state_hash(modhifi.load(old))
    monkeypatch.setattr(report, "render_html", crash)
    for out, force in ((tmp_path / "new", False), (old, True)):
        with pytest.raises(ModhifiError if isinstance(error, OSError) else (KeyboardInterrupt, ValueError)):
            save(out, saved[1], saved[2], force=force)
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and state_hash(modhifi.load(old)) == before


def test_force_replaces_the_whole_directory(saved, tmp_path):
    out = save(tmp_path / "a", saved[1], saved[2], log="of the run before")
    stale = out / "modhifi.log"
    assert stale.exists()
    with pytest.raises(ModhifiError, match="not empty"):
        save(out, saved[1], saved[2])
    save(out, saved[1], saved[2], force=True)
    assert not stale.exists() and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_directory_that_cannot_be_replaced_is_filled(saved, tmp_path, monkeypatch):
    out = save(tmp_path / "mounted", saved[1], saved[2], log="of the run before")
    number = out.stat().st_ino
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    save(out, saved[1], saved[2], force=True)
    assert out.stat().st_ino == number and intact(out)
    assert not [p.name for p in out.iterdir() if p.name.startswith((".", "modhifi.log"))]


def test_output_is_checked_before_the_work(tmp_path, monkeypatch):
    check_output(tmp_path / "deep" / "new")
    check_output(tmp_path)  # empty
    (tmp_path / "file").write_text("x")
    for out, force, message in (
        (tmp_path / "file", True, "is a file"),
        (tmp_path, False, "not empty"),
        (tmp_path, True, "'file', which modhifi did not write"),
        (tmp_path / "file" / "below", False, "cannot write to"),
        (Path.cwd(), True, "holds the current directory"),
        (Path.home().parent, True, "directory and is not replaced"),
    ):
        with pytest.raises(ModhifiError, match=message):
            check_output(out, force)


def test_a_model_with_other_modules_is_refused(tmp_path):
    loaded = tiny()
    edited = copy.deepcopy(loaded.model)
    edited.fc = nn.Sequential(edited.fc)
    with pytest.raises(ModhifiError, match="other modules"):
        save(tmp_path / "a", loaded, edited)
    assert list(tmp_path.iterdir()) == []


def test_a_timm_model_changed_by_hand_needs_its_skeleton(tmp_path):
    model = timm.create_model("resnet18", **RESNET)
    model.fc = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))
    loaded = load_model(model)
    edited, structure, plan = prune(replace(loaded, example=torch.randn(2, 3, 32, 32)))
    out = save(tmp_path / "a", loaded, edited, structure, plan)
    with pytest.raises(ModhifiError, match="skeleton="):
        modhifi.load(out)
    assert state_hash(modhifi.load(out, skeleton=model)) == state_hash(edited)


def test_data_are_described_item_by_item():
    hashes, skipped = ("a" * 16, "b" * 16), (("z", "broken"),)
    samples = Samples(lambda i: torch.zeros(3), hashes, None, ("x", "y"), "images:x", False, skipped)
    described = json.loads(json.dumps(describe_data(samples)))
    assert described["hashes"] == ["a" * 16, "b" * 16] and described["skipped"] == [["z", "broken"]]
    assert described["fingerprint"] == samples.fingerprint() and described["n"] == 2


def test_files_of_the_package_do_not_hide_its_functions():
    importlib.import_module("modhifi.models.load")
    assert callable(modhifi.load) and modhifi.load.__module__ == "modhifi.models.artifact"
    assert "load" in dir(modhifi) and not hasattr(modhifi, "nothing")
