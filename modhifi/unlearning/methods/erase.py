"""``erase``: readers that cannot tell the forgotten classes from the rest by any linear function."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.pruning.linalg import factorise
from modhifi.unlearning.closed_forms import Edit, directions
from modhifi.unlearning.methods.base import METHODS
from modhifi.unlearning.reader_edits import Reader, ReaderMethod
from modhifi.unlearning.settings import WHOLE, Defaults


def erasing_projection(
    gram: Tensor,
    mean: Tensor,
    forget_means: Tensor,
    retain_mean: Tensor,
    *,
    centred: bool = True,
    damping: float = 1e-4,
) -> tuple[Tensor, float]:
    """The oblique projection ``P`` ``(d, d)`` onto what tells the forgotten classes apart, and the damping used.

    ``P = D (D^T S^-1 D)^-1 D^T S^-1`` with ``D`` spanned by ``mu_f - mu_r`` of every forgotten class: of all ``P`` with
    ``P D = D`` the one with the least ``E |P (x - mu)|^2``. Not centred: also ``P mu_r = 0``. See :func:`erase` for the
    arguments, the source and what it raises.
    """
    gram, mean, retain_mean = gram.double(), mean.double(), retain_mean.double()
    basis = directions(forget_means.double() - retain_mean)
    held = basis
    if not centred and float(retain_mean.norm()) > 0:
        unit = retain_mean / retain_mean.norm()
        if float((unit - basis @ (basis.T @ unit)).norm()) < 1e-6:
            raise ModhifiError(
                "the retain mean is itself a direction to erase and this operator has no bias to keep it; "
                "leave the operator out or give it a bias"
            )
        held = torch.cat([basis, unit[:, None]], 1)
    factor, used = factorise(gram - torch.outer(mean, mean) if centred else gram, damping)
    read = torch.cholesky_solve(held, factor)
    coordinates = torch.linalg.solve(held.T @ read, read.T)
    return basis @ coordinates[: basis.shape[1]], used


def erase(
    weight: Tensor,
    gram: Tensor,
    mean: Tensor,
    forget_means: Tensor,
    retain_mean: Tensor,
    *,
    centred: bool = True,
    damping: float = 1e-4,
) -> Edit:
    """A reader that cannot tell the forgotten classes from the rest by any linear function: ``W' = W (I - P)``.

    ``weight``: ``(out, d)``. ``gram``, ``mean``: ``(d, d)``, ``(d,)`` of forget and retain samples pooled.
    ``forget_means``: ``(m, d)``, one row per forgotten class. ``retain_mean``: ``(d,)``. ``shift = W P mu_r``, so that
    every forgotten class mean and the retain mean give one output, the retain mean's. Raises ModhifiError where the
    moments cannot be factorised, or where a reader without a place for the mean is asked to erase the retain mean
    itself.

    Limits: ``P`` is idempotent, a second pass on the same moments changes nothing; it is blind to what differs
    in higher moments than the mean. Source: least-squares concept erasure, LEACE, Belrose et al. 2023 (the mean taken
    at the retain samples); the form without a place for the mean is ours.
    """
    projection, used = erasing_projection(gram, mean, forget_means, retain_mean, centred=centred, damping=damping)
    original = weight.double()
    change = original @ projection
    return Edit(original - change, change @ retain_mean.double() if centred else None, used)


def edit(reader: Reader) -> Edit:
    """As much of the full edit as its strength says."""
    mean, gram = reader.pooled()
    full = erase(
        reader.weight,
        gram,
        mean,
        reader.forget_means,
        reader.retain_mean,
        centred=reader.centred,
        damping=reader.damping,
    )
    return full.blend(reader.weight, reader.strength)


METHODS.register(
    ReaderMethod(
        "erase",
        "concept erasure at every reader, moments collected again for each",
        Defaults(1, 1, 1.0, WHOLE),
        edit,
        source="LEACE, Belrose et al. 2023 (arXiv 2306.03819)",
    )
)
