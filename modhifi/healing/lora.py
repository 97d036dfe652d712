"""Adapters of low rank in place of all weights, by peft (Hu et al. 2022, "LoRA"), merged at the end."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from modhifi.errors import ModhifiError

# The scale of the adapters over their rank: what Biderman et al. 2024 ("LoRA learns less and forgets less") advise.
SCALE = 2


def check_lora() -> None:
    """Raises ModhifiError, before any work, without peft."""
    if importlib.util.find_spec("peft") is None:
        raise ModhifiError("--lora needs the package peft; pip install 'modhifi[lora]'")


def add_adapters(model: nn.Module, rank: int, seed: int) -> Any:
    """Puts an adapter beside every linear map but the head, in place; returns what :func:`merge` takes."""
    check_lora()
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear"))


def merge(adapted: Any) -> nn.Module:
    """The model with its adapters added to its weights, as it was built."""
    merged: nn.Module = adapted.merge_and_unload()
    return merged
