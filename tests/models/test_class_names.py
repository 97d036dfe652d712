"""A checkpoint is loaded as the class that its configuration names, head and all; what is left out is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import modhifi
from modhifi.artifacts.save import save_artifact
from modhifi.cli.main import app
from modhifi.models.from_transformers import build
from modhifi.models.load import load_model
from modhifi.models.loaded import frozen
from modhifi.runs.inputs import Given
from modhifi.runs.recipes.tasks import parse
from modhifi.runs.run_recipe import run_recipe
from modhifi.runs.run_task import Circumstances
from modhifi.structure.clone import clone
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink
from modhifi.structure.tracing.tracer import trace

SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)
TEXT = SMALL | dict(vocab_size=50, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
IMAGE = SMALL | dict(image_size=16, patch_size=8)
STAGES = dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[2, 2, 4, 4], mlp_ratios=[2] * 4)
LLAMA = TEXT | dict(model_type="llama")


def pair(name: str, text: dict[str, Any], vision: dict[str, Any] = IMAGE, **more: Any) -> Any:
    return getattr(hf, f"{name}Config")(text_config=text, vision_config=vision, **more)


CONFIGS: dict[str, Callable[[], Any]] = {
    "YolosForObjectDetection": lambda: hf.YolosConfig(**IMAGE | dict(image_size=[16, 16]), num_detection_tokens=3),
    "SegformerForSemanticSegmentation": lambda: hf.SegformerConfig(**STAGES, decoder_hidden_size=16, image_size=32),
    "CLIPTextModelWithProjection": lambda: hf.CLIPTextConfig(**TEXT, projection_dim=8),
    "CLIPVisionModelWithProjection": lambda: hf.CLIPVisionConfig(**IMAGE, projection_dim=8),
    "LlavaForConditionalGeneration": lambda: pair(
        "Llava", LLAMA, IMAGE | dict(model_type="clip_vision_model"), image_token_index=49
    ),
    "Qwen2VLForConditionalGeneration": lambda: pair(
        "Qwen2VL",
        TEXT | dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}),
        dict(embed_dim=32, depth=1, num_heads=4, hidden_size=32, mlp_ratio=2, patch_size=8),
        image_token_id=45,
    ),
    "PaliGemmaForConditionalGeneration": lambda: pair(
        "PaliGemma",
        TEXT | dict(model_type="gemma", num_key_value_heads=1, head_dim=8),
        IMAGE | dict(model_type="siglip_vision_model"),
        image_token_id=49,
        projection_dim=32,
    ),
    "Idefics3ForConditionalGeneration": lambda: pair("Idefics3", LLAMA, image_token_id=49),
    "SmolVLMForConditionalGeneration": lambda: pair("SmolVLM", LLAMA, image_token_id=49),
    "PvtForImageClassification": lambda: hf.PvtConfig(
        image_size=32, num_labels=3, sequence_reduction_ratios=[2, 2, 1, 1], **STAGES
    ),
}


def saved(name: str, directory: Path) -> Any:
    torch.manual_seed(0)
    model = getattr(hf, name)(CONFIGS[name]()).eval()
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_class_that_the_configuration_names_is_loaded(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded.model) is type(model) and loaded.info["architecture"] == name
    assert name.startswith("Qwen2VL") or not loaded.warnings  # whose pixels have no row an item
    stored = model.state_dict()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in loaded.model.state_dict().items())
    assert type(build(model.config)) is type(model)
    output = loaded.logits(loaded.example)
    if loaded.kind == "text":
        assert output.shape == (2, 16, 50)
    elif name == "CLIPTextModelWithProjection":
        assert output.shape == (2, 8)


@pytest.mark.parametrize("name", ["PvtForImageClassification", "YolosForObjectDetection"])
def test_check_says_which_class_was_loaded(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert f"loaded as {name}\n" in result.stdout


def test_a_pruned_head_survives_the_artefact(tmp_path: Path) -> None:
    saved("YolosForObjectDetection", tmp_path / "model")
    loaded, pixels = load_model(tmp_path / "model"), torch.randn(2, 3, 16, 16)
    structure = trace(loaded.model, lambda model: model(loaded.example)).select(["class_labels_classifier.layers.0"])
    plan = Plan({"class_labels_classifier.layers.0": tuple(range(20))})
    small = frozen(shrink(clone(loaded.model), structure, plan))
    save_artifact(tmp_path / "small", small, loaded, structure, plan, manifest={}, recipe={}, report={})
    remote = hf.AutoModel.from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    with torch.no_grad():
        expected = small(pixels)
        for again, tolerance in ((modhifi.load(tmp_path / "small"), 0.0), (remote, 1e-5)):
            for name in ("logits", "pred_boxes"):
                torch.testing.assert_close(again(pixels)[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (hf.CLIPModel, lambda: pair("CLIP", TEXT, projection_dim=8)),
        (hf.SiglipModel, lambda: pair("Siglip", TEXT)),
        (hf.BlipModel, lambda: pair("Blip", TEXT, projection_dim=8)),
        (hf.BlipForConditionalGeneration, lambda: pair("Blip", TEXT, projection_dim=8)),
    ],
)
def test_a_class_that_reads_images_and_text_is_checked(make: Any, config: Callable[[], Any], tmp_path: Path) -> None:
    make(config()).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert f"loaded as {make.__name__}\n" in result.stdout and "neurons" in result.stdout


def test_weights_that_nothing_uses_are_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"value_head.weight": torch.ones(1, 32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sentence = "1 tensors of the checkpoint are not used by LlamaForCausalLM, such as 'value_head.weight'"
    assert sentence in CliRunner().invoke(app, ["check", str(tmp_path)]).stderr
    ids = torch.randint(3, 50, (12, 8))
    content = {"model": {"name": "x"}, "data": {"source": "python:Tensor", "samples": 8}, "budget": {"ratio": 0.5}}
    given = Given(load_model(tmp_path), ids)
    (done,) = run_recipe(parse(content), Circumstances("cpu", given, dry_run=True))
    assert sentence in done.report["warnings"]
