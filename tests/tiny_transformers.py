"""Every supported family of transformers, and timm's, with two narrow blocks of random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

SMALL = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
TEXT = dict(**SMALL, vocab_size=50, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = dict(**TEXT, num_key_value_heads=2, head_dim=6)
IMAGE = dict(**SMALL, image_size=32, patch_size=8, num_labels=5)
EXPERTS = dict(num_local_experts=3, num_experts_per_tok=2)
MIXTURE = GROUPED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

# name of the model class, of its configuration, and the configuration's fields
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED | dict(attention_bias=True, mlp_bias=True)),
    "llama, tied": ("LlamaForCausalLM", "LlamaConfig", GROUPED | dict(tie_word_embeddings=True)),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT | dict(num_key_value_heads=2)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", TEXT | dict(num_key_value_heads=2)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | dict(sliding_window=8)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | dict(sliding_window=8)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT | dict(num_key_value_heads=2)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64)),
    "codegen": (
        "CodeGenForCausalLM",
        "CodeGenConfig",
        dict(n_embd=32, n_inner=40, n_layer=2, n_head=8, vocab_size=50, n_positions=64, rotary_dim=4),
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", TEXT | dict(ffn_dim=40, word_embed_proj_dim=32)),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT | dict(rotary_pct=0.5)),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        TEXT | dict(relative_attention=True, position_buckets=8, pos_att_type=["c2p", "p2c"], share_att_key=True),
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        TEXT | dict(dim=32, hidden_dim=40, n_layers=2, n_heads=4),
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", IMAGE),
    "beit": ("BeitForImageClassification", "BeitConfig", IMAGE | dict(use_relative_position_bias=True)),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", IMAGE | dict(mlp_ratio=2)),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        dict(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            mlp_ratio=2.0,
            num_labels=5,
        ),
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | EXPERTS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", GROUPED | EXPERTS | dict(moe_intermediate_size=12)),
}
# Other mixtures of experts: shared experts, biases, matrices stored transposed, a correction of the router's choice.
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | EXPERTS | dict(num_local_experts=4)),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", MIXTURE | dict(shared_expert_intermediate_size=24)),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", GROUPED | EXPERTS | dict(num_local_experts=4, sliding_window=8)),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        GROUPED | dict(num_local_experts=4, num_experts_per_tok=1, moe_layers=[1], intermediate_size_mlp=40),
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        MIXTURE
        | dict(
            num_key_value_heads=4,
            head_dim=8,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
    ),
}
VIT = dict(embed_dim=32, depth=2, num_heads=4, mlp_ratio=2, img_size=32, patch_size=8)
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": dict(
        embed_dim=16, depths=(2, 2), num_heads=(2, 4), img_size=32, patch_size=4, window_size=4
    ),
    "convnext_atto": dict(dims=(8, 12, 12, 16), depths=(1, 1, 1, 1)),
}


def family(name: str) -> tuple[nn.Module, Tensor, Callable[[nn.Module], Tensor]]:
    """A model in float64 and eval mode, a batch of 2, one forward pass on that batch."""
    torch.manual_seed(0)
    if name in TIMM:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **TIMM[name])
    else:
        kind, config, fields = (FAMILIES | MIXTURES)[name]
        model = getattr(transformers, kind)(getattr(transformers, config)(**fields))
    pixels = name in TIMM or getattr(model, "main_input_name", "") == "pixel_values"
    batch = torch.randn(2, 3, 32, 32, dtype=torch.float64) if pixels else torch.randint(3, 50, (2, 12))

    def run(model: nn.Module) -> Tensor:
        return model(batch) if name in TIMM else model(batch).logits

    model = livelier(model.eval().requires_grad_(False))
    if "experts" in str(model):
        model.config._experts_implementation = "eager"  # torch has no grouped product in float64
    return model.double(), batch, run


def livelier(model: nn.Module) -> nn.Module:
    """Weights large enough, and biases, tables and scales random enough, that every part shows in the output."""
    for parameter in model.parameters():
        if parameter.ndim < 2 or float(parameter.std()) < 1e-4:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        else:
            parameter.data.mul_(5)
    return model
