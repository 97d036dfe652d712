"""Models whose forward pass asks for more than what they read: found by trying, drawn, pruned and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_transformers import livelier
from torch import nn

import modhifi
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.packing import Packing
from modhifi.pruning.stages import find_structure

SIZES: dict[str, Any] = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
TEXT = SIZES | dict(vocab_size=50, max_position_embeddings=32, pad_token_id=0)


def qwen2_5_vl() -> nn.Module:
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as config
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    sizes: dict[str, Any] = dict(depth=2, hidden_size=32, intermediate_size=40, num_heads=4, out_hidden_size=32)
    fields = config.Qwen2_5_VLVisionConfig(**sizes, patch_size=4, spatial_merge_size=1, window_size=16)
    return modeling.Qwen2_5_VisionTransformerPretrainedModel._from_config(fields)  # type: ignore[no-any-return]


def siglip2() -> nn.Module:
    return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4))


def bros() -> nn.Module:
    return transformers.BrosModel(transformers.BrosConfig(**TEXT | dict(hidden_size=64)))


def timesformer() -> nn.Module:
    sizes: dict[str, Any] = SIZES | dict(image_size=16, patch_size=8, num_frames=2, num_labels=5)
    return transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**sizes))


def instructblip() -> nn.Module:
    config = transformers.InstructBlipConfig(
        vision_config=SIZES | dict(image_size=16, patch_size=8),
        qformer_config=TEXT | dict(encoder_hidden_size=32),
        text_config=dict(
            model_type="opt", hidden_size=32, ffn_dim=40, num_hidden_layers=1, num_attention_heads=4, vocab_size=60
        )
        | dict(word_embed_proj_dim=32, max_position_embeddings=256),
        num_query_tokens=3,
        image_token_index=59,
    )
    return transformers.InstructBlipForConditionalGeneration(config)


def gemma3n_audio() -> nn.Module:
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder

    sizes: dict[str, Any] = dict(
        hidden_size=32, input_feat_size=16, conf_num_hidden_layers=1, sscp_conv_channel_size=[8, 4]
    )
    config = transformers.Gemma3nAudioConfig(**sizes, conf_num_attention_heads=4)
    return Gemma3nAudioEncoder._from_config(config)  # type: ignore[no-any-return]


def decision_transformer() -> nn.Module:
    sizes: dict[str, Any] = dict(state_dim=5, act_dim=3, hidden_size=32, n_layer=2, n_head=4, max_ep_len=16)
    return transformers.DecisionTransformerModel(transformers.DecisionTransformerConfig(**sizes))


def autoformer() -> nn.Module:
    sizes: dict[str, Any] = dict(
        d_model=32, prediction_length=4, context_length=8, lags_sequence=[1, 2], label_length=4
    )
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=40, decoder_ffn_dim=40)
    return transformers.AutoformerModel(transformers.AutoformerConfig(**sizes, **layers, num_time_features=1))


def dia() -> nn.Module:
    heads: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, vocab_size=50)
    cross = dict(cross_hidden_size=32, cross_num_attention_heads=4, cross_num_key_value_heads=4, cross_head_dim=8)
    tokens = dict(pad_token_id=0, eos_token_id=1, bos_token_id=2)
    return transformers.DiaForConditionalGeneration(
        transformers.DiaConfig(
            encoder_config=transformers.DiaEncoderConfig(**sizes, **heads),
            decoder_config=transformers.DiaDecoderConfig(**sizes, **heads, **cross, num_channels=3),
            **tokens,
            delay_pattern=[0, 1, 2],
        )
    )


BUILDERS = {
    decision_transformer: {"states", "actions", "returns_to_go", "timesteps"},
    autoformer: {
        *("past_values", "past_time_features", "past_observed_mask"),
        *("future_values", "future_time_features"),
    },
    dia: {"input_ids", "attention_mask", "decoder_input_ids"},
    instructblip: {"input_ids", "attention_mask", "pixel_values", "qformer_input_ids"},
    gemma3n_audio: {"audio_mel", "audio_mel_mask"},
    qwen2_5_vl: {"hidden_states", "grid_thw"},
    siglip2: {"pixel_values", "pixel_attention_mask", "spatial_shapes"},
    bros: {"input_ids", "attention_mask", "bbox"},
    timesformer: {"pixel_values"},
}


@pytest.mark.parametrize("build", BUILDERS)
def test_what_is_missing_is_found(build: Any) -> None:
    torch.manual_seed(0)
    loaded = load_model(livelier(build().eval()))
    loaded.require_runs()
    assert {part.name for part in loaded.parts} == BUILDERS[build]
    assert any(part.kind == "given" for part in loaded.parts)
    assert {group.kind for group in find_structure(loaded).prunable} >= {"neurons"}
    samples = load_samples("synthetic", loaded, n=4, seed=0)
    assert len(set(samples.hashes)) == 4 and not torch.equal(samples.load(0), samples.load(1))
    assert loaded.packing is not None and Packing.from_json(loaded.packing.to_json()) == loaded.packing
    assert bool(loaded.logits(samples.load(0)[None]).isfinite().all())


def test_rows_of_all_items_are_read_one_after_the_other() -> None:
    loaded = load_model(livelier(qwen2_5_vl().eval()))
    assert loaded.packing is not None and loaded.packing.flat == ("hidden_states",)
    with torch.no_grad():
        both = loaded.logits(loaded.example)
        each = [loaded.logits(item[None]) for item in loaded.example]
    torch.testing.assert_close(both, torch.cat(each))


@pytest.mark.slow
def test_it_is_pruned_and_loaded_again(tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict(samples=8, evaluation_samples=4, batch_size=4, checks={"walked": 0})
    small = modhifi.prune(livelier(siglip2().eval()), "synthetic", ratio=0.3, out=tmp_path / "small", **sizes)
    again = load_model(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again.logits(again.example), again.logits(again.example, small.model))
