"""Attention whose values have a width of their own, with biases and query heads that share values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SHARED, SIZE = 12, 4, 2, 6


class Grouped(nn.Module):
    """Four query heads over two key-value heads; ``between`` stands in front of the last linear map."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, HEADS * 4), nn.Linear(WIDTH, SHARED * 4)
        self.v, self.out = nn.Linear(WIDTH, SHARED * SIZE), nn.Linear(HEADS * SIZE, WIDTH)
        self.between, self.last = between or nn.Identity(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (m(x).unflatten(-1, (SHARED, -1)).transpose(1, 2) for m in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.last(self.out(self.between(mixed.transpose(1, 2).flatten(2))))


def grouped(between: nn.Module | None = None) -> tuple[Grouped, Tensor]:
    """A model in float64 and eval mode, and 40 sequences of 7 for it."""
    torch.manual_seed(0)
    return Grouped(between).double().eval().requires_grad_(False), torch.randn(40, 7, WIDTH, dtype=torch.float64)
