"""Whether BatchNorm statistics are better re-estimated after an edit: tried on unlabelled images, kept if they are."""

from __future__ import annotations

from torch import nn

from modhifi.bounds.held_out import tabulate_several
from modhifi.calibration.batchnorm import reestimate_batchnorm
from modhifi.data.samples import Samples
from modhifi.models.hooks import normalises_by_batch
from modhifi.models.loaded import LoadedModel
from modhifi.structure.clone import clone


def reestimate_if_closer(model: nn.Module, original: LoadedModel, samples: Samples, batch_size: int) -> str:
    """Re-estimates a model's BatchNorm statistics in place where that brings it closer to the original.

    Statistics of every other sample are judged on the rest by their agreement with the original's top-1, and by the
    divergence between equals, of values by the variance kept; the held-out samples are not looked at. Those of all
    samples are kept if they win. Never on synthetic samples, whose statistics are not those of real ones
    (docs/method.md). Returns what was done, in words.
    """
    if not normalises_by_batch(model):
        return "there is no BatchNorm to re-estimate"
    if samples.synthetic or len(samples) < 4:
        return "BatchNorm keeps its statistics: these samples cannot tell better ones"
    fit, judge = (samples.subset(range(start, len(samples), 2)) for start in (0, 1))
    trial = clone(model)
    reestimate_batchnorm(trial, original, fit, batch_size)
    tables = tabulate_several(original, [model, trial], judge, batch_size)
    if original.gives_values:
        measure, figures = "the variance kept", [(table.explained or 0.0, -table.relative_error) for table in tables]
    else:
        measure, figures = "agreement", [(float(table.agreement.mean()), -float(table.kl.mean())) for table in tables]
    before, after = figures
    if after > before:
        reestimate_batchnorm(model, original, samples, batch_size)
    kept = "were re-estimated" if after > before else "stay as they were"
    return (
        f"BatchNorm statistics {kept}: re-estimated on half of the calibration samples, {measure} on the other "
        f"{len(judge)} went from {before[0]:.1%} to {after[0]:.1%}"
    )
