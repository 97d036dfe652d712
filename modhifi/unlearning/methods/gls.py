"""``gls``: least squares between keeping the retained output and pulling the forgotten one to its mean."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.pruning.linalg import damping_unit, factorise
from modhifi.unlearning.closed_forms import Edit, about
from modhifi.unlearning.methods.base import METHODS
from modhifi.unlearning.reader_edits import Reader, ReaderMethod
from modhifi.unlearning.settings import Defaults


def gls(
    weight: Tensor,
    forget_gram: Tensor,
    forget_mean: Tensor,
    retain_gram: Tensor,
    retain_mean: Tensor,
    *,
    strength: float,
    centred: bool = True,
    damping: float = 1e-4,
) -> Edit:
    """Generalised least squares between keeping the retain output and pulling the forget output to the retain mean's.

    ``weight``: ``(out, d)``; means ``(d,)``, Grams ``(d, d)``. Minimises ``E_r |(W' - W)(x - mu_r)|^2 + rho |W' - W|^2
    + lambda E_f |W' (x - mu_r)|^2``: ``W' = W R (R + lambda F)^-1`` with ``R``, ``F`` the second moments of retain and
    forget samples about the retain mean, ``rho = damping`` of the mean diagonal of ``R`` and
    ``lambda = strength * tr R / tr F``. Not centred: ``R``, ``F`` about zero and the forget output pulled to
    ``W mu_r``: ``W' = W (R + lambda mu_r mu_f^T) (R + lambda F)^-1``. ``strength`` 0 changes nothing. Raises
    ModhifiError where the moments cannot be factorised. Limits: a compromise, never complete forgetting. Source: ours.
    """
    original, forget_mean, retain_mean = weight.double(), forget_mean.double(), retain_mean.double()
    origin = retain_mean if centred else torch.zeros_like(retain_mean)
    keep, drop = about(retain_gram, retain_mean, origin), about(forget_gram, forget_mean, origin)
    energy = float(drop.trace())
    pull = strength * float(keep.trace()) / energy if energy > 0 else 0.0
    # The ridge belongs to what is kept, so that it pulls towards the original weight.
    unit = damping_unit(keep)
    factor, used = factorise(keep + pull * drop, damping, unit)
    ridged = keep + used * unit * torch.eye(len(keep), dtype=torch.float64)
    target = ridged if centred else ridged + pull * torch.outer(retain_mean, forget_mean)
    edited = torch.cholesky_solve((original @ target).T, factor).T
    return Edit(edited, (original - edited) @ retain_mean if centred else None, used)


def edit(reader: Reader) -> Edit:
    """The edit of one reader; its strength is the weight of forgetting."""
    mean, gram = reader.forgotten()
    return gls(
        reader.weight,
        gram,
        mean,
        reader.retain_gram,
        reader.retain_mean,
        strength=reader.strength,
        centred=reader.centred,
        damping=reader.damping,
    )


METHODS.register(
    ReaderMethod(
        "gls",
        "least squares between the retained output and the retained mean for the forgotten one",
        Defaults(2, 1, 1.0, "weight of forgetting against retaining, in units of tr R / tr F"),
        edit,
        source="ours",
    )
)
