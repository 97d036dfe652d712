"""``hifi-zero``: zero the weights with the highest fidelity on the forgotten samples."""

from __future__ import annotations

from torch import Tensor

from modhifi.unlearning.closed_forms import Edit
from modhifi.unlearning.masking import SHARE, mask_weights
from modhifi.unlearning.methods.base import METHODS
from modhifi.unlearning.reader_edits import Reader, ReaderMethod
from modhifi.unlearning.settings import Defaults


def hifi_zero(weight: Tensor, scores: Tensor, blocks: Tensor, share: float, *, mean: Tensor | None = None) -> Edit:
    """Zero the ``share`` of the weights ``W_ci`` with the highest fidelity on the forget samples.

    ``weight``: ``(out, d)``. ``scores``: ``(out, n)``, the singleton fidelity of component ``i`` for output ``c``.
    ``blocks``: ``(n, m)`` int64, the columns of each component. ``share`` in [0, 1]; components with no positive score
    are never chosen. ``mean``: ``(d,)`` retain mean, to move the lost mean into a shift; the paper moves nothing.
    Raises ModhifiError for a share outside [0, 1]. Source: arXiv 2511.19566, its rule for BatchNorm networks (the top
    1 to 20 %).
    """
    return mask_weights(weight, scores, blocks, share, 0.0, mean)


def edit(reader: Reader) -> Edit:
    """The edit of one reader; its strength is the share of the weights."""
    return hifi_zero(reader.weight, reader.fidelity(*reader.forgotten()), reader.components, reader.strength)


METHODS.register(
    ReaderMethod(
        "hifi-zero",
        "zero the share of the weights with the highest fidelity on the forgotten samples",
        Defaults(2, 1, 0.03, SHARE),
        edit,
        source="arXiv 2511.19566, its rule for BatchNorm networks",
        scored_once=True,
        edits_classifier=False,
    )
)
