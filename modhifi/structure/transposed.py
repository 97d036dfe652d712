"""The linear layer of GPT-2, told apart without its library: importing transformers takes a second."""

from __future__ import annotations

from torch import nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: a linear layer whose weight is (in, out)."""
    return any((c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D") for c in type(module).__mro__)
