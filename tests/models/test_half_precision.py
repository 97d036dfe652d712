"""Products in bfloat16 are made where a device has instructions for them, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modhifi.models.half_precision import has_bfloat16, in_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_a_cpu_makes_them_where_torch_knows_of_instructions(
    capabilities: dict[str, bool], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(CPU) is has
    model = nn.Linear(2, 2)
    for dtype in (torch.float32, torch.float16):
        with in_bfloat16(model.to(dtype)):
            product = model(torch.ones(1, 2, dtype=dtype))
        assert product.dtype == (torch.bfloat16 if has and dtype == torch.float32 else dtype)


def test_an_older_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_bfloat16(CPU)
