"""``projection``: the input loses its part in the forget space, but for what lies in the retain space."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.unlearning.closed_forms import Edit
from modhifi.unlearning.methods.base import METHODS
from modhifi.unlearning.reader_edits import Reader, ReaderMethod
from modhifi.unlearning.settings import Defaults


def projection(
    weight: Tensor, forget_gram: Tensor, retain_gram: Tensor, *, forget_scale: float, retain_scale: float
) -> Edit:
    """Remove from the input its part in the forget space, but for what lies in the retain space.

    ``weight``: ``(out, d)``, Grams ``(d, d)`` about zero. ``W' = W [I - (I - M_r) M_f]``, ``M = U L U^T`` with the
    Gram's eigenvectors and ``L = a s / ((a - 1) s + 1)``, ``s`` its eigenvalues normalised to sum 1, ``a`` =
    ``forget_scale`` or ``retain_scale`` (searched per model in the paper). No shift. An empty forget space changes
    nothing. Raises ModhifiError for a scale that is not positive. Source: Kodge, Saha and Roy, TMLR 2024.
    """
    original = weight.double()
    forget, retain = _soft_projector(forget_gram, forget_scale), _soft_projector(retain_gram, retain_scale)
    lost = original @ forget - original @ retain @ forget
    return Edit(original - lost, None)


def _soft_projector(gram: Tensor, scale: float) -> Tensor:
    if scale <= 0:
        raise ModhifiError(f"a projection scale of {scale:g} is not positive; choose 1 or more")
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp_min(0)
    total = values.sum()
    values = values / total if float(total) > 0 else values
    soft: Tensor = vectors @ torch.diag(scale * values / ((scale - 1) * values + 1)) @ vectors.T
    return soft


def edit(reader: Reader) -> Edit:
    """The edit of one reader; its strength is the scale of the forget space."""
    _, gram = reader.forgotten()
    scale = reader.strength
    return projection(reader.weight, gram, reader.retain_gram, forget_scale=scale, retain_scale=10 * scale)


METHODS.register(
    ReaderMethod(
        "projection",
        "the input loses its part in the forget space, but for what lies in the retain space",
        Defaults(2, 1, 10.0, "scale of the forget space; that of the retain space is ten times it"),
        edit,
        source="Kodge, Saha and Roy, TMLR 2024",
    )
)
