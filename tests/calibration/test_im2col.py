"""The rows of an operator times its matrix are what the operator gives, at every position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modhifi.calibration.im2col import reader_rows
from modhifi.structure.operators import columns_of, weight_matrix, write_weight

OPERATORS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5), (2, 7, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), dilation=(2, 1), padding=1), (2, 4, 7, 8)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=(1, 0, 1)), (2, 2, 4, 5, 4)),
    "transposed conv1d": (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=2, output_padding=1), (2, 4, 5)),
    "transposed conv2d": (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 3), groups=2), (2, 4, 5, 4)),
    "transposed conv3d": (nn.ConvTranspose3d(2, 3, 2, stride=2, padding=1, bias=False), (2, 2, 3, 4, 3)),
    "cropped": (nn.ConvTranspose2d(3, 4, 1, stride=2, padding=1), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_times_the_matrix_are_the_outputs(name: str) -> None:
    module, shape = OPERATORS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows, expected = reader_rows(module, x), module(x)
    matrix = weight_matrix(module)
    assert columns_of(module) == (len(matrix), matrix.shape[2])
    outputs = (matrix.float() @ rows).flatten(0, 1)
    expected = _channels_first(module, expected)
    if module.bias is not None:
        outputs = outputs + module.bias.detach()[:, None]
    torch.testing.assert_close(outputs, expected)


def _channels_first(module: Any, output: Tensor) -> Tensor:
    return (output.movedim(-1, 0) if isinstance(module, nn.Linear) else output.transpose(0, 1)).flatten(1)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_written_matrix_is_read_back(name: str) -> None:
    module, _ = OPERATORS[name]
    before = module.weight.detach().clone()
    write_weight(module, weight_matrix(module))
    assert torch.equal(module.weight, before)
