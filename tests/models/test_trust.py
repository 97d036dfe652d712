"""A directory is loaded from its own files, without the network, whatever its descriptions ask for."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny_transformers
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg
from tiny_text import tokenizer
from typer.testing import CliRunner

import modhifi
from modhifi.artifacts.save import save_artifact
from modhifi.cli.main import app
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import Manifest
from modhifi.models.trust import architecture_arguments, listed_files
from modhifi.pruning.stages import find_structure
from modhifi.runs.inputs import original_of
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink

# By these, timm's factory loads weights; and one that nobody has heard of.
LOADING = [
    "model_name",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "new",
]

WATCHED: list[Path] = []
OPENED: list[str] = []
SOCKETS: list[str] = []
# Where the files of libraries are, and what the system says of itself.
LIBRARIES = [sys.prefix, sys.base_prefix, *map(os.path.realpath, sys.path), "/proc", "/sys", "/dev", "/etc"]
LIBRARIES += [str(Path(module.__file__).resolve().parents[1]) for module in (torch, timm, transformers)]


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and WATCHED and isinstance(arguments[0], str | bytes):
        OPENED.append(os.fsdecode(arguments[0]))
    elif event.startswith("socket.") and WATCHED:
        SOCKETS.append(event)


sys.addaudithook(watch)  # cannot be removed again


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A world in which every request and every file outside the model's directory is noticed; a bait to be opened."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    requests: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        requests.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    bait = tmp_path / "outside" / "bait.safetensors"
    bait.parent.mkdir()
    save_file({"x": torch.zeros(1)}, bait)
    WATCHED.append(bait)
    OPENED.clear()
    SOCKETS.clear()
    yield bait
    WATCHED.clear()
    assert not requests and not SOCKETS
    assert not [path for path in OPENED if str(bait.parent) in path]


def artefact(directory: Path, loaded: LoadedModel) -> Path:
    return save_artifact(directory, loaded.model, loaded, None, None, manifest={}, recipe={}, report={})


@pytest.fixture(scope="module")
def of_timm(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artefact(tmp_path_factory.mktemp("timm") / "saved", load_model(str(model_dir)))


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    model = tiny_transformers.family("llama")[0].float()
    model.save_pretrained(folder / "plain")
    tokenizer().save_pretrained(folder / "plain")
    return artefact(folder / "saved", load_model(str(folder / "plain")))


@pytest.fixture(scope="module")
def of_uneven_layers(of_transformers: Path) -> Path:
    loaded = load_model(str(of_transformers.parent / "plain"))
    structure = find_structure(loaded)
    (group, *_) = (g for g in structure.prunable if g.kind == "neurons")
    plan = Plan({group.name: tuple(range(8))})
    small = shrink(copy.deepcopy(loaded.model), structure, plan)
    out = of_transformers.parent / "uneven"
    return save_artifact(out, small, loaded, structure, plan, manifest={}, recipe={}, report={})


@pytest.mark.parametrize("kind", ["of_timm", "of_transformers", "of_uneven_layers", "plain", "model_dir"])
def test_only_files_of_the_directory_are_opened(kind: str, alone: Path, request: pytest.FixtureRequest) -> None:
    given = "of_transformers" if kind == "plain" else kind
    directory = request.getfixturevalue(given)
    directory = directory.parent / "plain" if kind == "plain" else directory
    OPENED.clear()
    load_model(str(directory))
    allowed = [*LIBRARIES, str(directory)]
    assert [path for path in OPENED if path.startswith(str(directory))]
    assert not [path for path in OPENED if not any(os.path.realpath(path).startswith(root) for root in allowed)]


def copied(source: Path, to: Path, file: str, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, to)
    path = to / file
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))
    return to


def test_no_argument_of_an_architecture_says_where_weights_are() -> None:
    own = set(inspect.signature(timm.create_model).parameters) | set(inspect.signature(build_model_with_cfg).parameters)
    known = architecture_arguments()
    assert not known & (own - {"kwargs", "model_cls"})
    assert not [
        name for name in known if re.search(r"path(?<!drop_path)$|file|url|hub|cache|pretrained(?!_window)|dict", name)
    ]
    assert {"num_classes", "channels", "stem_width", "img_size", "output_stride", "block_args"} <= known


@pytest.mark.parametrize("field", ["model_args", "base_args"])
@pytest.mark.parametrize("name", LOADING)
def test_arguments_that_load_weights_are_refused(field: str, name: str, alone: Path, of_timm: Path, tmp_path: Path):
    def change(manifest: dict[str, Any]) -> None:
        if field == "base_args":
            manifest["base"]["args"] = {name: str(alone)}
        else:
            manifest["model"]["info"]["model_args"][name] = str(alone)

    directory = copied(of_timm, tmp_path / "model", "modhifi.json", change)
    with pytest.raises(ModhifiError, match=f"argument {re.escape(name)},"):
        modhifi.load(directory)


@pytest.mark.parametrize("name", ["url", "hf_hub_id", "hf_hub_filename", "file", "source", "state_dict", "unheard_of"])
def test_places_in_the_configuration_are_not_looked_at(name: str, alone: Path, of_timm: Path, tmp_path: Path):
    def change(manifest: dict[str, Any]) -> None:
        manifest["model"]["info"]["pretrained_cfg"][name] = str(alone)

    x = torch.randn(2, 3, 32, 32)
    directory = copied(of_timm, tmp_path / "model", "modhifi.json", change)
    assert torch.equal(modhifi.load(directory)(x), modhifi.load(of_timm)(x))


@pytest.mark.parametrize("name", ["hf-hub:org/name", "local-dir:/tmp", "org/name", "no_such_model"])
def test_an_architecture_is_a_name_of_the_registry(name: str, alone: Path, of_timm: Path, tmp_path: Path):
    def change(manifest: dict[str, Any]) -> None:
        manifest["model"]["info"] |= {"architecture": name, "pretrained_cfg": {}}

    with pytest.raises(ModhifiError, match="no architecture"):
        modhifi.load(copied(of_timm, tmp_path / "model", "modhifi.json", change))


@pytest.mark.parametrize("name", LOADING[1:])
def test_a_directory_of_timm_is_held_to_the_same(name: str, alone: Path, model_dir: Path, tmp_path: Path):
    directory = copied(
        model_dir, tmp_path / "model", "config.json", lambda c: c["model_args"].update({name: str(alone)})
    )
    with pytest.raises(ModhifiError, match=f"argument {re.escape(name)},"):
        load_model(str(directory))


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "org/kernel"},
        {"_attn_implementation": "org/kernel@main:name"},
        {"attn_implementation": {"": "org/kernel"}},
        {"text_config": {"attn_implementation": "paged|org/kernel"}},
        {"experts_implementation": "org/kernel"},
        {"_attn_implementation_internal": "org/kernel"},
        {"vision_config": {"parts": [{"_attn_implementation_internal": {"x": "org/kernel"}}]}},
    ],
)
@pytest.mark.parametrize("kind", ["plain", "saved"])
def test_a_kernel_of_the_hub_is_code(
    change: dict[str, Any], kind: str, alone: Path, of_transformers: Path, tmp_path: Path
):
    source = of_transformers.parent / kind
    directory = copied(source, tmp_path / "model", "config.json", lambda config: config.update(change))
    with pytest.raises(ModhifiError, match="kernel .*org/kernel.*trust_remote_code"):
        load_model(str(directory))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"model_type": "detr", "backbone": "org/name", "use_timm_backbone": False}),
        ("config.json", {"model_type": "timm_wrapper", "architecture": "hf-hub:org/name"}),
        ("config.json", {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": {"pretrained": True}}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "org/name--code.Model"}, "model_type": "unheard_of"}),
        ("adapter_config.json", {"base_model_name_or_path": "org/name", "peft_type": "LORA"}),
        ("tokenizer_config.json", {"tokenizer_file": "BAIT", "vocab_file": "BAIT", "merges_file": "BAIT"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["org/name--code.Tokenizer", None]}}),
        ("tokenizer_config.json", {"name_or_path": "org/name", "tokenizer_class": "LlamaTokenizer"}),
        ("generation_config.json", {"custom_generate": "org/name", "_name_or_path": "org/name"}),
        ("preprocessor_config.json", {"image_processor_type": "ViTImageProcessor", "_name_or_path": "org/name"}),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "saved"])
def test_nothing_of_transformers_is_fetched(
    file: str, change: dict[str, Any], kind: str, alone: Path, of_transformers: Path, tmp_path: Path
):
    source = of_transformers.parent / kind
    said = json.loads(json.dumps(change).replace("BAIT", str(alone)))
    directory = copied(source, tmp_path / "model", file, lambda content: content.update(said))
    try:
        loaded = load_model(str(directory))
    except ModhifiError as error:
        assert "\n" not in str(error)
    else:
        whole = load_model(str(source))
        assert torch.equal(loaded.logits(whole.example), whole.logits(whole.example))


@pytest.mark.parametrize("name", ["../outside/bait.safetensors", "BAIT", "a/b.safetensors", "..\\x", "C:x", "..", ""])
@pytest.mark.parametrize("kind", ["plain", "saved", "timm"])
def test_an_index_names_files_of_its_directory(
    name: str, kind: str, alone: Path, of_transformers: Path, of_timm: Path, tmp_path: Path
):
    source = of_timm if kind == "timm" else of_transformers.parent / kind
    content = {"metadata": {}, "weight_map": {"x": name.replace("BAIT", str(alone))}}
    directory = copied(source, tmp_path / "model", "model.safetensors.index.json", lambda index: index.update(content))
    with pytest.raises(ModhifiError, match="not a file of this directory"):
        load_model(str(directory))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {"x": 3}}', "[" * 100_000])
def test_a_broken_index_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ModhifiError, match="restore the file"):
        listed_files(tmp_path / "index.json")


def test_weights_that_came_later_are_told(alone: Path, of_timm: Path, tmp_path: Path) -> None:
    """An index beside the saved file may overlay tensors of it with those of another one."""
    content = {"weight_map": {"x": "model.safetensors", "y": "other.safetensors"}}
    directory = copied(of_timm, tmp_path / "model", "model.safetensors.index.json", lambda c: c.update(content))
    weights = load_file(directory / "model.safetensors")
    save_file({"fc.bias": weights["fc.bias"] + 1}, directory / "other.safetensors")
    with pytest.warns(UserWarning, match="their hash differs"):
        model = modhifi.load(directory)
    assert torch.equal(model.fc.bias, weights["fc.bias"] + 1)
    shown = CliRunner().invoke(app, ["check", str(directory), "--json"])
    assert "their hash differs" in json.loads(shown.stdout)["warnings"][0]
    assert shown.stderr.startswith("modhifi: warning: the weights in") and shown.stderr.count("\n") == 1


def manifest_of(base: str, model: Any) -> Manifest:
    differences: dict[str, Any] = {"shapes": {}, "attributes": {}, "dtypes": {}}
    return Manifest.model_validate(
        {
            "schema_version": 1,
            "base": {"source": base},
            "model": {"framework": "timm", "info": {}, "differences": differences},
            "weights": {"files": {}},
            "recipe": {"model": model},
        }
    )


def test_a_manifest_trusts_no_code() -> None:
    model = {"name": "hf:org/name", "revision": "abc", "trust_remote_code": True}
    source = original_of(manifest_of("hf:org/name", model))
    assert source.revision == "abc" and not source.trust_remote_code


@pytest.mark.parametrize("model", [3, "x", {"name": "timm:x", "args": 3}, {"name": "timm:x", "pretrained": []}])
def test_an_original_that_nobody_can_load_is_one_line(model: Any) -> None:
    try:
        assert original_of(manifest_of("timm:x", model)).name == "timm:x"
    except ModhifiError as error:
        assert "give the original" in str(error)


def test_code_of_an_image_processor_is_not_asked_for(tmp_path: Path, alone: Path) -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**tiny_transformers.IMAGE))
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    (directory / "code.py").write_text("raise SystemExit('ran')")
    content = {"auto_map": {"AutoImageProcessor": "code.Processor"}, "image_processor_type": "Processor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ModhifiError, match="trust_remote_code"):
        load_model(str(directory))


@pytest.mark.parametrize("changes", [{"crop_pct": "x"}, {"crop_pct": [1]}, {"mean": ["x"] * 3}, {"input_size": [3]}])
@pytest.mark.parametrize("kind", ["artefact", "timm"])
def test_preprocessing_that_means_nothing_is_one_line(
    changes: dict[str, Any], kind: str, of_timm: Path, model_dir: Path, tmp_path: Path
) -> None:
    def change(content: dict[str, Any]) -> None:
        (content["model"]["info"] if kind == "artefact" else content)["pretrained_cfg"].update(changes)

    source, file = (of_timm, "modhifi.json") if kind == "artefact" else (model_dir, "config.json")
    directory = copied(source, tmp_path / "model", file, change)
    with pytest.raises(ModhifiError) as caught:
        load_model(str(directory))
    assert "\n" not in str(caught.value)
