"""Tiny configurations of every model type of transformers, from a table of field names and a few peculiarities.

A field of the table is set where a configuration class has one of that name; nested configurations alike. What a class
refuses by name is dropped again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

VOCABULARY = 64
# What a model may have at most to be called tiny.
PARAMETERS = 25_000_000
FIELDS: dict[str, Any] = {
    **dict.fromkeys("hidden_size n_embd d_model dim projection_dim text_embed_dim".split(), 64),
    **dict.fromkeys("intermediate_size n_inner d_ff ffn_dim hidden_dim encoder_ffn_dim decoder_ffn_dim".split(), 48),
    **dict.fromkeys("ffn_hidden_size intermediate_size_mlp mlp_dim d_inner decoder_ffn_hidden_size".split(), 48),
    **dict.fromkeys("num_hidden_layers n_layer num_layers encoder_layers decoder_layers n_layers".split(), 2),
    **dict.fromkeys("encoder_num_hidden_layers decoder_num_hidden_layers num_decoder_layers".split(), 2),
    **dict.fromkeys("num_attention_heads n_head num_heads n_heads encoder_attention_heads".split(), 8),
    **dict.fromkeys("decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads".split(), 8),
    **dict.fromkeys("attention_heads decoder_num_attention_heads num_encoder_attention_heads".split(), 8),
    **dict.fromkeys("num_key_value_heads num_kv_heads encoder_num_key_value_heads n_kv_heads".split(), 4),
    **dict.fromkeys("decoder_num_key_value_heads".split(), 4),
    **dict.fromkeys("head_dim d_kv d_head attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim".split(), 8),
    **dict.fromkeys("vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input".split(), VOCABULARY),
    **dict.fromkeys("decoder_vocab_size text_vocab_size codebook_size".split(), VOCABULARY),
    **dict.fromkeys(
        "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_target_positions".split(), 192
    ),
    **dict.fromkeys("max_source_positions context_length word_embed_proj_dim embedding_size lru_width".split(), 64),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_k moe_topk top_k_experts experts_per_token".split(), 2),
    **dict.fromkeys("moe_intermediate_size expert_ffn_hidden_size".split(), 16),
    **dict.fromkeys("shared_expert_intermediate_size shared_intermediate_size".split(), 24),
    **dict.fromkeys("n_shared_experts moe_num_shared_experts num_shared_experts n_group topk_group".split(), 1),
    **dict.fromkeys("first_k_dense_replace num_mem_blocks mamba_n_groups n_groups mamba_ngroups".split(), 1),
    **dict.fromkeys("q_lora_rank kv_lora_rank".split(), 16),
    **dict.fromkeys("sliding_window attention_window_size hidden_size_per_layer_input index_head_dim".split(), 8),
    **dict.fromkeys("mamba_d_state mamba_d_head mamba_chunk_size state_size chunk_size mamba_headdim".split(), 8),
    **dict.fromkeys("mamba_head_dim ssm_state_size linear_key_head_dim linear_value_head_dim".split(), 8),
    **dict.fromkeys("mamba_n_heads mamba_num_heads".split(), 16),
    **dict.fromkeys("mamba_dt_rank time_step_rank rotary_dim index_n_heads".split(), 4),
    **dict.fromkeys("n_mamba_heads linear_num_key_heads index_topk".split(), 2),
    **dict.fromkeys("linear_num_value_heads".split(), 4),
    "mamba_d_ssm": 128,
    **dict.fromkeys("image_token_id image_token_index".split(), VOCABULARY - 1),
    **dict.fromkeys("video_token_id video_token_index".split(), VOCABULARY - 2),
    **dict.fromkeys("audio_token_id audio_token_index".split(), VOCABULARY - 3),
    **dict.fromkeys("vision_start_token_id image_start_token_id boi_token_id".split(), VOCABULARY - 4),
    **dict.fromkeys("vision_end_token_id image_end_token_id eoi_token_id".split(), VOCABULARY - 5),
    **dict.fromkeys("boi_token_index image_start_token_index".split(), VOCABULARY - 4),
    **dict.fromkeys("eoi_token_index image_end_token_index".split(), VOCABULARY - 5),
    "backbone": "test_resnet",
    **dict.fromkeys("out_hidden_size output_channels reassemble_hidden_size".split(), 64),
    "entity_vocab_size": 16,
    "prediction_length": 8,
    "mm_tokens_per_image": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "type_vocab_size": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
    "num_queries": 5,
    "use_mamba_kernels": False,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "depth": 2,
    "depths": [1, 1, 1, 1],
    "num_mel_bins": 16,
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
FOUR = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
WINDOWS = dict(patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, mlp_ratio=2.0)
# What one type needs beside the table; None leaves a field of the table out.
PECULIAR: dict[str, dict[str, Any]] = {
    **dict.fromkeys("gemma2 gemma3_text exaone4 olmo3 ministral cohere2 modernbert-decoder gpt_oss".split(), SLIDING),
    **dict.fromkeys("llama mistral qwen2 qwen3 smollm3 gemma phi3 mixtral vit deit".split(), {"hidden_size": 96}),
    **dict.fromkeys("qwen3_next qwen3_5_text qwen3_5_moe_text minimax olmo_hybrid".split(), LINEAR),
    **dict.fromkeys("convnext convnextv2".split(), FOUR | {"patch_size": 4}),
    **dict.fromkeys("resnet regnet bit".split(), FOUR | {"embedding_size": 16, "groups_width": 8, "num_groups": 4}),
    **dict.fromkeys("swin swinv2 donut-swin maskformer-swin".split(), WINDOWS),
    **dict.fromkeys("albert electra".split(), {"embedding_size": 32}),
    **dict.fromkeys("dinov2 dinov2_with_registers".split(), {"mlp_ratio": 2}),
    "bamba": {"attn_layer_indices": [1]},
    "chmv2": {
        "post_process_channels": [16, 16, 24, 24],
        "fusion_hidden_size": 16,
        "head_hidden_size": 16,
        "number_output_channels": 16,
    },
    "beit": {"use_relative_position_bias": True, "hidden_size": 96},
    "clap_audio_model": {"num_mel_bins": 64, "hidden_size": 768},
    "clvp_encoder": {"num_attention_heads": 2},
    "clvp_decoder": {"decoder_fixing_codes": [3, 4, 5, 6]},
    "dia_decoder": {"cross_hidden_size": 64, "cross_num_attention_heads": 8, "cross_num_key_value_heads": 8},
    "convbert": {"embedding_size": 32, "head_ratio": 2},
    "data2vec-vision": {"use_relative_position_bias": True},
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_buckets": 8,
    },
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cvt": {
        "embed_dim": [16, 24, 32],
        "num_heads": [2, 2, 4],
        "depth": [1, 1, 2],
        "mlp_ratio": [2.0, 2.0, 2.0],
        "patch_size": [7, 3, 3],
    },
    "dinat": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
    "edgetam_vision_model": {
        "backbone_config": {
            "model_type": "timm_wrapper",
            "architecture": "repvit_m1",
            "num_classes": 5,
            "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
        },
        "fpn_hidden_size": 64,
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": 64},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4},
    "focalnet": {"embed_dim": 16, "depths": [1, 1, 1, 1], "patch_size": 4, "mlp_ratio": 2.0},
    "flaubert": {"n_words": VOCABULARY, "emb_dim": 64},
    "xlm": {"n_words": VOCABULARY, "emb_dim": 64},
    "qwen2_vl_vision": {"embed_dim": 64, "num_heads": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "perceiver": {
        "d_latents": 64,
        "num_latents": 8,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_cross_attention_heads": 4,
        "num_self_attention_heads": 4,
    },
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox_japanese": {"intermediate_multiple_size": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hiera": {
        "embed_dim": 16,
        "image_size": [64, 64],
        "num_heads": [2, 2, 4, 4],
        "patch_kernel": [7, 7],
        "patch_stride": [4, 4],
        "mlp_ratio": 2.0,
    },
    "imagegpt": {"n_positions": 1024, "vocab_size": 513},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "led": {"attention_window": [4, 4]},
    **dict.fromkeys(["hy_v4_vl_text"], {"index_head_dim": 72}),
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "levit": {
        "patch_size": 16,
        "image_size": 64,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [4, 6, 8],
        "key_dim": [8, 8, 8],
        "depths": [1, 1, 1],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"num_experts_per_tok": 1, "moe_layers": [1], "no_rope_layers": [1, 0], "attention_chunk_size": 8},
    "longformer": {"attention_window": [4, 4]},
    "mamba2": {"num_heads": 16, "head_dim": 8},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "mobilenet_v1": {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 64},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 12, 16, 16, 20, 24],
        "num_attention_heads": 4,
        "mlp_ratio": 2.0,
        "patch_size": 2,
        "image_size": 64,
    },
    "mobilevitv2": {"width_multiplier": 0.25, "patch_size": 2, "n_attn_blocks": [1, 1, 1], "image_size": 64},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"]},
    "qwen2": {"hidden_size": 96, "intermediate_size": 72},
    # queries have as many heads as keys and values there
    "moonshine": {"encoder_num_key_value_heads": 8, "decoder_num_key_value_heads": 8},
    **dict.fromkeys(
        "rt_detr rt_detr_v2".split(),
        {"encoder_in_channels": [24, 32, 40], "encoder_hidden_dim": 64, "decoder_in_channels": [64, 64, 64]},
    ),
    "rt_detr_resnet": FOUR | {"embedding_size": 16},
    "uvdoc_backbone": {"out_indices": [1, 2, 3, 4, 5, 6]},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "paligemma": {"projection_dim": 96},
    "poolformer": FOUR | {"patch_sizes": [7, 3, 3, 3], "patch_size": 16},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2, "num_decoder_attention_heads": 8, "ngram": 2},
    "pvt": FOUR | {"num_attention_heads": [2, 2, 4, 4], "mlp_ratios": [2, 2, 2, 2], "patch_sizes": [4, 2, 2, 2]},
    "pvt_v2": FOUR | {"num_attention_heads": [2, 2, 4, 4], "mlp_ratios": [2, 2, 2, 2]},
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 64},
    "segformer": FOUR
    | {
        "num_attention_heads": [2, 2, 4, 4],
        "decoder_hidden_size": 32,
        "mlp_ratios": [2, 2, 2, 2],
        "patch_sizes": [7, 3, 3, 3],
    },
    "swiftformer": {"embed_dims": [16, 24, 32, 40], "mlp_ratio": 2},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "t5": {"feed_forward_proj": "gated-gelu"},
    "wavlm": {"num_buckets": 16},
    "xlstm": {"num_blocks": 2, "num_heads": 4},
    "yolos": {"image_size": [32, 32], "num_detection_tokens": 5},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "adapter_rank": 4},
}
# Types whose rotations of text and images are divided by default as large heads are.
TURNING = """glm4v_moe_text glm4v_text glm_image_text glm_ocr_text hunyuan_vl_text paddleocr_vl_text
    qwen2_5_vl_text qwen2_vl_text""".split()
# The tasks in order of preference: a model type is built as the first of these that it has.
TASKS = """CAUSAL_LM SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ MASKED_LM IMAGE_CLASSIFICATION OBJECT_DETECTION
    SEMANTIC_SEGMENTATION UNIVERSAL_SEGMENTATION CTC AUDIO_CLASSIFICATION IMAGE_TEXT_TO_TEXT DEPTH_ESTIMATION
    TIME_SERIES_PREDICTION SEQUENCE_CLASSIFICATION""".split()
# Parameters that are no weights: large ones would make a recurrence blow up.
DELICATE = ("A_log", "dt_bias", "time_decay", "time_first", "dt_proj.bias", "recurrent_param", "igate", "fgate")


def model_types() -> list[str]:
    """Every model type of which transformers has a class that can be built and run."""
    return [name for name in CONFIG_MAPPING_NAMES if class_name(name) is not None]


def class_name(model_type: str) -> str | None:
    """The class that a type is built as: of its first task, else its bare model."""
    tables = [getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS]
    for table in (*tables, auto.MODEL_MAPPING_NAMES):
        names = table.get(model_type, ())
        for name in [names] if isinstance(names, str) else names:
            builder = getattr(transformers, name, None)
            built = isinstance(builder, type) and issubclass(builder, transformers.PreTrainedModel)
            if built and builder.config_class is _config_class(model_type):
                return str(name)
    return None


def _config_class(model_type: str) -> Any:
    return getattr(transformers, CONFIG_MAPPING_NAMES[model_type], None)


def fields_for(kind: type) -> dict[str, Any]:
    """The fields of the table that a configuration class has, and such fields for each of its nested ones."""
    known: dict[str, Any] = getattr(kind, "__dataclass_fields__", {})
    fields = {name: value for name, value in FIELDS.items() if name in known or name == "num_labels"}
    if "kv_lora_rank" in known:  # multi-head latent attention has a key-value head for every query head
        fields["num_key_value_heads"] = 8
    for name in ("sliding_window", "intermediate_size_mlp", "num_experts", "n_routed_experts"):
        if name in fields and getattr(known.get(name), "default", 0) is None:
            del fields[name]
    for name, nested, default in _nested(kind):
        peculiar = PECULIAR.get(getattr(nested, "model_type", ""), {})
        fields[name] = configuration(nested, _as_backbone(default) | peculiar).to_dict()
    return fields


def _nested(kind: type) -> Iterator[tuple[str, type, Any]]:
    """The nested configurations of a configuration class, with the classes that its default has there, and those."""
    default = None
    for name, nested in (getattr(kind, "sub_configs", None) or {}).items():
        if nested is transformers.AutoConfig:
            with suppress(Exception):  # not every class has a default
                default = default or kind()
            nested = type(getattr(default, name, None))
        if getattr(nested, "__dataclass_fields__", None) and name in getattr(kind, "__dataclass_fields__", {}):
            yield name, nested, getattr(default, name, None)


def _as_backbone(default: Any) -> dict[str, Any]:
    """What the configuration of a backbone says of the stages that it hands on: as many as by default."""
    stages = getattr(default, "out_indices", None)
    if stages is None:
        return {}
    fields = {name: value for name, value in vars(default).items() if isinstance(value, bool) and name[0] != "_"}
    if hasattr(default, "num_hidden_layers"):
        return fields | {"num_hidden_layers": len(stages), "out_indices": [*range(1, len(stages) + 1)]}
    return fields | {"out_indices": list(stages)}


def _rotations(config: Any) -> Any:
    """The configuration, whose rotations of text and images share the numbers that its heads have."""
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type in TURNING:
        rope.setdefault("mrope_section", [0, 0, 0])
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if "mrope_section" in part:
            share = part.get("partial_rotary_factor") or 1.0
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            half = int(size * share) // 2
            count = len(part["mrope_section"])
            part["mrope_section"] = [half - half // count * (count - 1), *[half // count] * (count - 1)]
    return config


def configuration(kind: type, peculiar: dict[str, Any] | None = None) -> Any:
    """A tiny configuration of a class; raises what the class raises."""
    model_type = getattr(kind, "model_type", "")
    peculiar = PECULIAR.get(model_type, {}) if peculiar is None else peculiar
    fields = fields_for(kind) | peculiar
    for _ in range(12):
        try:
            return _rotations(kind(**fields))
        except Exception as error:
            bad = [name for name in fields if re.search(rf"\b{name}\b", str(error)) and name not in peculiar]
            if not bad:
                raise
            for name in bad:
                del fields[name]
    return _rotations(kind(**fields))


def build(model_type: str) -> nn.Module:
    """A tiny random model in eval mode. Raises what its classes raise, and ValueError for one that is not tiny."""
    name = class_name(model_type)
    assert name is not None
    builder, config = getattr(transformers, name), configuration(_config_class(model_type))
    with torch.device("meta"):
        size = sum(p.numel() for p in builder(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"not tiny: {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return livelier(builder(config))


def livelier(model: nn.Module) -> nn.Module:
    """Weights large enough, and biases, tables, scales random enough, that every part shows in the output."""
    generator = torch.Generator().manual_seed(1)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in DELICATE) or not parameter.is_floating_point():
                continue
            spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
            if parameter.ndim < 2 or spread < 1e-4:
                parameter.add_(0.2 * noise(parameter))
            else:
                wanted = 0.5 if "emb" in name.lower() else parameter[0].numel() ** -0.5
                parameter.mul_(max(1.0, min(20.0, 1.2 * wanted / spread)))
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                module.running_mean.copy_(0.1 * noise(module.running_mean))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval().requires_grad_(False)
