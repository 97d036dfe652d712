"""Copies keep what a model holds, but for what passes have remembered."""

from __future__ import annotations

import torch
from torch import nn

from modhifi.structure.clone import clone


def test_a_cache_for_each_device_is_forgotten_and_any_other_dictionary_stays() -> None:
    model = nn.Linear(2, 2)
    model.bias_cache = {"cpu": torch.ones(2)}
    model.scale_cache = {"in": torch.ones(2), "limit": 3.0, "cpu": "a word"}
    copied = clone(model)
    assert copied.bias_cache == {} and model.bias_cache.keys() == {"cpu"}
    assert copied.scale_cache.keys() == {"in", "limit", "cpu"}
