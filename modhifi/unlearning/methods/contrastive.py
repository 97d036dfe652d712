"""``contrastive``: zero the weights that serve the forgotten samples most beyond the retained ones."""

from __future__ import annotations

from torch import Tensor

from modhifi.unlearning.closed_forms import Edit
from modhifi.unlearning.masking import SHARE, mask_weights
from modhifi.unlearning.methods.base import METHODS
from modhifi.unlearning.reader_edits import Reader, ReaderMethod
from modhifi.unlearning.settings import Defaults


def contrastive(
    weight: Tensor,
    forget_scores: Tensor,
    retain_scores: Tensor,
    blocks: Tensor,
    share: float,
    *,
    mean: Tensor | None = None,
) -> Edit:
    """Zero the ``share`` of the weights whose fidelity on the forget samples most exceeds that on the retain samples.

    ``weight``: ``(out, d)``. ``forget_scores``, ``retain_scores``: ``(out, n)``. ``blocks``: ``(n, m)`` int64, the
    columns of each component. ``mean``: ``(d,)`` retain mean, whose lost part becomes a shift. Weights that serve the
    retained classes more are never chosen. Raises ModhifiError for a share outside [0, 1]. Source: ours, on the scores
    of arXiv 2511.19566.
    """
    return mask_weights(weight, forget_scores - retain_scores, blocks, share, 0.0, mean)


def edit(reader: Reader) -> Edit:
    """The edit of one reader; its strength is the share of the weights."""
    return contrastive(
        reader.weight,
        reader.fidelity(*reader.forgotten()),
        reader.fidelity(reader.retain_mean, reader.retain_gram),
        reader.components,
        reader.strength,
        mean=reader.retain_mean if reader.centred else None,
    )


METHODS.register(
    ReaderMethod(
        "contrastive",
        "zero the weights whose fidelity on the forgotten samples most exceeds that on the retained ones",
        Defaults(2, 1, 0.03, SHARE),
        edit,
        source="ours, on the scores of arXiv 2511.19566",
        scored_once=True,
        edits_classifier=False,
    )
)
