"""``head-mask``: close the classifier's outputs; the control that forgets nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.unlearning.classifier_edits import ClassifierMethod
from modhifi.unlearning.closed_forms import Edit
from modhifi.unlearning.methods.base import METHODS
from modhifi.unlearning.settings import WHOLE, Defaults

# The bias that closes an output: finite in half precision, and zero after any softmax.
CLOSED = -1e4


def head_mask(weight: Tensor, bias: Tensor | None, classes: Sequence[int]) -> Edit:
    """Close the outputs ``classes`` of a classifier: the control that forgets nothing.

    ``weight``: ``(out, d)``, ``bias``: ``(out,)`` or None. With a bias the rows become zero and the biases ``CLOSED``;
    without one they become the mean of the other rows, which is never the largest output.
    Raises ModhifiError where a class does not exist or none is left.
    """
    original, outputs = weight.double(), weight.shape[0]
    wrong = [c for c in classes if not 0 <= c < outputs]
    if wrong:
        raise ModhifiError(f"class {wrong[0]} does not exist; the classifier has outputs 0 to {outputs - 1}")
    closed = torch.zeros(outputs, dtype=torch.bool)
    closed[list(classes)] = True
    if bool(closed.all()):
        raise ModhifiError("every class would be forgotten; leave at least one")
    if bias is None:
        return Edit(torch.where(closed[:, None], original[~closed].mean(0), original), None)
    shift = torch.where(closed, CLOSED - bias.double(), 0.0)
    return Edit(original.masked_fill(closed[:, None], 0.0), shift)


METHODS.register(
    ClassifierMethod(
        "head-mask",
        "close the classifier's outputs; the control that erases nothing",
        Defaults(1, 1, 1.0, WHOLE),
        head_mask,
    )
)
