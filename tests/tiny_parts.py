"""Tiny models of transformers that read sounds, series or several inputs, saved with what prepares these."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_text
import torch
import transformers
from PIL import Image
from tiny_transformers import livelier

PART: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.0
)
TOKENS: dict[str, Any] = dict(vocab_size=tiny_text.VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TEXT = PART | TOKENS | dict(max_position_embeddings=24)
VISION = PART | dict(image_size=16, patch_size=8)
ENCODER_DECODER: dict[str, Any] = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=40,
    decoder_ffn_dim=40,
)
CONVOLUTIONS: dict[str, Any] = dict(
    conv_dim=[12, 12, 12],
    conv_stride=[5, 2, 2],
    conv_kernel=[10, 3, 2],
    num_feat_extract_layers=3,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    mask_time_prob=0.0,
)


def _t5() -> Any:
    sizes = dict(d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **TOKENS, n_positions=24))


def _bart() -> Any:
    config = transformers.BartConfig(
        **ENCODER_DECODER, **TOKENS, max_position_embeddings=24, decoder_start_token_id=2, forced_eos_token_id=None
    )
    return transformers.BartForConditionalGeneration(config)


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        **ENCODER_DECODER,
        **TOKENS,
        num_mel_bins=16,
        max_source_positions=16,
        max_target_positions=12,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _wav2vec2() -> Any:
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**PART, **TOKENS, **CONVOLUTIONS))


def _ast() -> Any:
    sizes = dict(num_mel_bins=16, max_length=32, patch_size=8, frequency_stride=8, time_stride=8, num_labels=5)
    return transformers.ASTForAudioClassification(transformers.ASTConfig(**PART, **sizes))


def _clip() -> Any:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def _llava() -> Any:
    text = transformers.LlamaConfig(**TEXT | dict(vocab_size=tiny_text.VOCABULARY + 1), num_key_value_heads=2)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=tiny_text.VOCABULARY
    )
    return transformers.LlavaForConditionalGeneration(config)


def _smolvlm() -> Any:
    text = TEXT | dict(vocab_size=tiny_text.VOCABULARY + 1, num_key_value_heads=2, model_type="llama")
    config = transformers.SmolVLMConfig(
        text_config=text, vision_config=VISION, image_token_id=tiny_text.VOCABULARY, scale_factor=2, pad_token_id=0
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def _detr() -> Any:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 12, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        **ENCODER_DECODER,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=5,
        num_labels=5,
    )
    return transformers.DetrForObjectDetection(config)


def _patchtst() -> Any:
    config = transformers.PatchTSTConfig(
        num_input_channels=3,
        context_length=32,
        patch_length=4,
        patch_stride=4,
        d_model=32,
        num_attention_heads=4,
        ffn_dim=40,
        num_hidden_layers=2,
        prediction_length=8,
    )
    return transformers.PatchTSTForPrediction(config)


MODELS: dict[str, Callable[[], Any]] = {
    "t5": _t5,
    "bart": _bart,
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
    "ast": _ast,
    "clip": _clip,
    "llava": _llava,
    "smolvlm": _smolvlm,
    "detr": _detr,
    "patchtst": _patchtst,
}


def model(name: str) -> Any:
    """A tiny model of random weights, in eval mode."""
    torch.manual_seed(0)
    return livelier(MODELS[name]().eval().requires_grad_(False))


def save(name: str, directory: Path) -> Path:
    """The model with the tokenizer of whole words and, where it hears, its preparation of sound."""
    built = model(name)
    built.save_pretrained(directory)
    if name not in ("detr", "patchtst", "ast"):
        tiny_text.tokenizer().save_pretrained(directory)
    if name == "wav2vec2":
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(directory)
    return directory


def sounds(directory: Path, count: int = 6) -> Path:
    """Files of tones, 16 bits at 8,000 a second, in two channels."""
    directory.mkdir()
    for number in range(count):
        time = np.arange(8000) / 8000
        tone = np.stack([np.sin(2 * np.pi * (200 + 90 * number) * time * (1 + time))] * 2, 1)
        with wave.open(str(directory / f"{number}.wav"), "wb") as file:
            file.setnchannels(2), file.setsampwidth(2), file.setframerate(8000)
            file.writeframes((20000 * tone).astype("<i2").tobytes())
    return directory


def pictures(directory: Path, count: int = 8) -> Path:
    directory.mkdir()
    chance = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(chance.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(directory / f"{number}.png")
    return directory
