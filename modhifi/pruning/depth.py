"""Depth: the writer before removed blocks and sublayers takes over what they added."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modhifi.calibration.moments import Moments
from modhifi.calibration.streams import span_moments
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.editing import LayerError
from modhifi.pruning.linalg import damping_unit, factorise, mean_diagonal, shrinkage, shrunk
from modhifi.pruning.sequential import written_modules
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.depth import Span, removed_parts, silence, spans
from modhifi.structure.groups import Branch, Structure
from modhifi.structure.operators import absorb_mean, columns_of, kernel_size, weight_matrix, write_weight
from modhifi.structure.places import operator_at
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import removed_positions

SpanMoments = Mapping[tuple[str, str], Moments]
"""The moments of :func:`modhifi.calibration.streams.span_moments`."""


def fold(joint: Tensor, rows: int, kept: Tensor, ridge: float) -> Tensor:
    """The least-squares map of a writer's input x to what a span adds, Δ: ``A_K = C_{:,K}(S_KK + λI)⁻¹``, ``(o, d)``.

    ``joint`` float64 ``(d + o, d + o)`` is the second moment of ``[x, Δ]`` over so many ``rows``: S of x and
    ``C = E[Δ xᵀ]``, both centred or both not. ``kept`` bool ``(d,)`` are the columns K that x still has; A is zero
    elsewhere. λ is ``ridge`` times the mean diagonal of S, which is shrunk as in `readers.applied_second`. Raises
    :class:`modhifi.errors.IndefiniteError`.
    """
    d = len(kept)
    second, cross = joint[None, :d, :d], joint[d:, :d]
    second = shrunk(second, shrinkage(second, rows), mean_diagonal(second))[0]
    factor, _ = factorise(second[kept][:, kept], ridge, damping_unit(second))
    result = torch.zeros_like(cross)
    result[:, kept] = torch.cholesky_solve(cross[:, kept].T, factor).T
    return result


def gain(model: nn.Module, branch: Branch) -> Tensor:
    """What the norm and the scales behind a writer multiply its output with, by channel, float64 ``(o,)``."""
    weight = model.get_submodule(branch.writer).get_parameter("weight")
    scale = torch.ones(weight_matrix(model.get_submodule(branch.writer)).shape[1], dtype=torch.float64)
    scale = scale.to(weight.device)
    if branch.norm is not None:
        norm: nn.Module = model.get_submodule(branch.norm)
        variance: Tensor = norm.running_var  # type: ignore[assignment]
        scale = scale * norm.get_parameter("weight").double() * (variance.double() + norm.eps).rsqrt()  # type: ignore[operator]
    for name in branch.gains:
        scale = scale * model.get_parameter(name).double().reshape(-1)
    return scale


def fold_span(
    model: nn.Module, structure: Structure, span: Span, moments: Moments, lost: Tensor | None, ridge: float
) -> LayerError:
    """Let the writer before a span add what the span added, in place, as well as its input tells it.

    ``lost`` are the input channels that the writer loses itself. Channels that its norm or scale all but close cannot
    be written, and stay as they are.
    """
    name = span.keeper.writer
    module, sink = model.get_submodule(name), structure.operators[name].sink
    weight = weight_matrix(module)
    d, kernel = columns_of(module)[1], kernel_size(module)
    channels = torch.ones(d // kernel, dtype=torch.bool)
    if lost is not None:
        channels[lost] = False
    kept = channels.repeat_interleave(kernel).to(weight.device)
    joint = (moments.cov if sink is not None else moments.gram)[0]
    scale = gain(model, span.keeper)
    written = scale.abs() > 1e-6 * scale.abs().max()
    a = fold(joint, moments.n, kept, ridge) * written[:, None]
    inverse = torch.where(written, 1 / scale, 0.0)
    write_weight(module, weight + inverse[:, None] * a)
    if sink is not None:
        mean_x, mean_added = moments.mean[0, :d], moments.mean[0, d:]
        absorb_mean(model, name, sink, inverse * (mean_added - a @ mean_x) * written)
    energy = float(joint[d:, d:].trace())
    explained = 2 * (a * joint[d:, :d]).sum() - ((a @ joint[:d, :d]) * a).sum()
    return LayerError(span.removed[0].writer, max(0.0, energy - float(explained)), energy)


def remove_branches(
    model: nn.Module, structure: Structure, plan: Plan, moments: SpanMoments, settings: PruneSettings
) -> tuple[LayerError, ...]:
    """Let the blocks and sublayers that a plan removes add nothing, and the writers before them make up for it.

    In place; shapes stay. Without moments of a span nothing makes up for it.
    """
    parts = removed_parts(structure, plan)
    lost = {name: at for (name, role), at in removed_positions(structure, plan).items() if role == "reader"}
    silence(model, structure, parts)
    return tuple(
        fold_span(model, structure, span, moments[span.name], lost.get(span.keeper.writer), settings.ridge)
        for span in spans(structure, parts)
        if span.name in moments
    )


def moments_of_plans(
    loaded: LoadedModel,
    structure: Structure,
    plans: Iterable[Plan],
    samples: Samples,
    settings: PruneSettings,
    progress: Progress = silent,
    known: Container[tuple[str, str]] = (),
) -> dict[tuple[str, str], Moments]:
    """The moments of every span, but for those ``known``, that one of the plans removes.

    None where nothing is to make up for them.
    """
    if not COMPENSATIONS[settings.compensate].needs_moments:
        return {}
    wanted = [span for plan in plans for span in spans(structure, removed_parts(structure, plan))]
    wanted = [span for span in wanted if span.name not in known]
    return span_moments(loaded, wanted, samples, settings.sampling, progress)


@contextmanager
def restored(model: nn.Module, modules: Iterable[str]) -> Iterator[None]:
    """Afterwards, the own tensors of some modules are as they were before."""
    owners = [operator_at(model, name) for name in dict.fromkeys(modules)]
    own = [tensor for m in owners for tensor in (*m.parameters(), *m.buffers())]
    with torch.no_grad():
        saved = [tensor.clone() for tensor in own]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(own, saved, strict=True):
                tensor.copy_(value)


@contextmanager
def branches_restored(model: nn.Module, structure: Structure, plan: Plan) -> Iterator[None]:
    """Afterwards, what :func:`remove_branches` writes for a plan is as it was before."""
    with restored(model, written_without(structure, removed_parts(structure, plan))):
        yield


def written_without(structure: Structure, parts: Iterable[str]) -> list[str]:
    """The modules that the removal of some blocks and sublayers writes to, in the whole model's shapes."""
    names = []
    for span in spans(structure, parts):
        names += written_modules(structure, [span.keeper.writer])
        names += [name for branch in span.removed for name in (branch.writer, branch.norm) if name is not None]
    return names
