"""Attacks on a feature space: can a class that the output forgot still be read from it? Closed forms on tensors.

Features are ``(n, d)``, labels int64 ``(n,)``. Every attack learns on one set and predicts another, int64 ``(n,)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Ridge in units of the standardised features' variance, as in the reference measurements.
RIDGE = 1e-3
NEIGHBOURS = 20


def standardise(fit: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets, float64, in units of the fitted set's mean and standard deviation; constant features become 0."""
    fit, test = fit.double(), test.double()
    mean, spread = fit.mean(0), fit.std(0)
    scale = torch.where(spread > 1e-9 * spread.max().clamp_min(1e-30), spread, torch.inf)
    return (fit - mean) / scale, (test - mean) / scale


def linear_probe(fit: Tensor, labels: Tensor, test: Tensor, ridge: float = RIDGE) -> Tensor:
    """The classes that a ridge regression on one-hot labels reads from the features."""
    a, b = standardise(fit, test)
    classes: Tensor
    classes, targets = labels.unique(return_inverse=True)
    a, b = F.pad(a, (0, 1), value=1.0), F.pad(b, (0, 1), value=1.0)
    eye = torch.eye(a.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(a.T @ a + ridge * len(a) * eye, a.T @ F.one_hot(targets).double())
    return classes[(b @ weights).argmax(1)]


def nearest_mean(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """The class whose mean is nearest, in standardised features."""
    a, b = standardise(fit, test)
    classes: Tensor = labels.unique()
    means = torch.stack([a[labels == c].mean(0) for c in classes])
    return classes[torch.cdist(b, means).argmin(1)]


def nearest_neighbours(fit: Tensor, labels: Tensor, test: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The class of most of the ``k`` nearest fitted samples, in standardised features; fewer where there are fewer."""
    a, b = standardise(fit, test)
    classes: Tensor
    classes, targets = labels.unique(return_inverse=True)
    nearest = torch.cdist(b, a).topk(min(k, len(a)), largest=False).indices
    return classes[F.one_hot(targets[nearest], len(classes)).sum(1).argmax(1)]


def relearn(fit: Tensor, labels: Tensor, test: Tensor, forgotten: list[int], shots: int = 10) -> Tensor:
    """Nearest class mean, where the means of the forgotten classes come from their first ``shots`` samples alone."""
    keep = torch.ones(len(labels), dtype=torch.bool)
    for c in forgotten:
        keep[torch.nonzero(labels == c).flatten()[shots:]] = False
    return nearest_mean(fit[keep], labels[keep], test)


def auc(members: Tensor, others: Tensor) -> float:
    """The chance that a member's score exceeds another's, ties counting half: 0.5 says that they look the same."""
    order = torch.cat([others, members]).double()
    values, inverse, counts = order.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - counts).double() + (counts.double() + 1) / 2
    total = ranks[inverse][len(others) :].sum()
    n, m = len(members), len(others)
    return float((total - n * (n + 1) / 2) / (n * m))
