"""How far two sets of outputs are apart, and the few samples on which that is looked at."""

from __future__ import annotations

from torch import Tensor

from modhifi.data.samples import Samples
from modhifi.structure.groups import Structure
from modhifi.structure.outputs import classes_last, spread_of

# Fewest and most samples that probe the effect of one group.
PROBES = (3, 32)


def probe_of(structure: Structure, samples: Samples) -> Tensor:
    """One batch of samples that shows what the loss of single components does to the output.

    So many that probing all groups takes about half as many forward passes as the calibration.
    """
    count = sum(len(group.parts) or 1 for group in structure.prunable)
    return next(samples.batches(min(len(samples), max(PROBES[0], min(PROBES[1], len(samples) // (2 * count))))))


def output_change(dense: Tensor, changed: Tensor, values: bool = False) -> float:
    """How far two sets of outputs ``(batch, ..., classes)`` are apart.

    Of logits it is the mean Kullback-Leibler divergence in nats, of ``values`` the squared distance over their spread.
    """
    if values:
        distance = classes_last(changed.float() - dense.float()).square().sum(-1).mean()
        return float(distance) / spread_of([(dense, None)])
    p, q = (classes_last(outputs).float().log_softmax(-1) for outputs in (dense, changed))
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))
