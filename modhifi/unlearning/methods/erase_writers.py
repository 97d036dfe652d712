"""``erase-writers``: writers that subtract from the residual stream what tells the forgotten classes apart."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.pruning.linalg import factorise
from modhifi.unlearning.closed_forms import Edit, about, directions
from modhifi.unlearning.methods.base import METHODS
from modhifi.unlearning.settings import WHOLE, Defaults
from modhifi.unlearning.writer_edits import WriterMethod, WriterOfStream

# Channels that their BatchNorm or layer scale attenuates below this share of the median cannot be written.
SCALE_FLOOR = 1e-3


def erase_writers(
    weight: Tensor,
    forget_means: Tensor,
    forget_grams: Tensor,
    retain_mean: Tensor,
    retain_gram: Tensor,
    *,
    scale: Tensor | None = None,
    forget_weight: float = 0.1,
    exact: bool = False,
    centred: bool = True,
    damping: float = 1e-4,
) -> Edit:
    """A writer that subtracts from the residual stream what tells the forgotten classes apart there.

    ``weight``: ``(out, d)``. The moments are those of the joint rows ``v = [x, s]``, ``d + out`` long: ``x`` the
    writer's input, ``s`` the stream right after the writer's branch is added. ``forget_means``: ``(m, d + out)``,
    ``forget_grams``: ``(m, d + out, d + out)``, one for each forgotten class; ``retain_mean``: ``(d + out,)``,
    ``retain_gram``: ``(d + out, d + out)``. ``scale``: ``(out,)``, what stands between the writer's output and the
    stream: ``gamma / sqrt(var + eps)`` of a BatchNorm, a layer scale, or None for 1; channels with a scale near zero
    are left alone. ``forget_weight``: the share of the forget samples in the pooled moments.

    With ``D`` the directions ``mu_f(s) - mu_r(s)``, ``A = S_s^-1 D (D^T S_s^-1 D)^-1`` and ``z = A^T (s - mu_r(s))``,
    ``D z`` is what LEACE would remove from ``s``. ``B`` predicts ``z`` from ``x - mu_r(x)`` by least squares, and the
    writer subtracts ``D B^T (x - mu_r(x))``: ``W' = W - diag(1 / scale) D B^T``, a change of rank ``m``.
    ``exact`` constrains ``B`` so that the class means of the stream coincide afterwards; without it they close as far
    as ``x`` explains them. Not centred (a plain Linear without bias): ``B^T mu_r(x) = 0``, and no shift.

    Raises ModhifiError where the moments cannot be factorised, or the constraints contradict each other. Limits:
    ungrouped writers; the class may survive in a nonlinear function of ``s``. Source: ours; the target is that of
    LEACE (Belrose et al. 2023).
    """
    original, width = weight.double(), weight.shape[1]
    retain_mean = retain_mean.double()
    # Everything about the retain mean: the projection is the same for any mixture, the regression is not.
    share = forget_weight / len(forget_means)
    # In place: these matrices are the largest there are.
    moments = about(retain_gram, retain_mean, retain_mean).mul_(1 - forget_weight)
    for class_mean, class_gram in zip(forget_means, forget_grams, strict=True):
        moments.add_(about(class_gram, class_mean, retain_mean), alpha=share)
    gaps = (forget_means.double() - retain_mean).T
    basis = directions(gaps[width:].T)
    stream, _ = factorise(moments[width:, width:], damping)
    read = torch.cholesky_solve(basis, stream)
    scores = torch.linalg.solve(basis.T @ read, read.T).T

    factor, used = factorise(moments[:width, :width], damping)
    predict = torch.cholesky_solve(moments[:width, width:] @ scores, factor)
    fixed, target = gaps.new_zeros(width, 0), gaps.new_zeros(0, basis.shape[1])
    if exact:
        fixed, target = gaps[:width], gaps[width:].T @ scores
    if not centred:
        fixed = torch.cat([fixed, retain_mean[:width, None]], 1)
        target = torch.cat([target, target.new_zeros(1, basis.shape[1])])
    if fixed.shape[1]:
        pull = torch.cholesky_solve(fixed, factor)
        # In units of squared standard deviations: a class gap below a thousandth of one is none.
        inverse = torch.linalg.pinv(fixed.T @ pull, atol=1e-6, hermitian=True)
        predict = predict + pull @ inverse @ (target - fixed.T @ predict)
        missed = (fixed.T @ predict - target).abs().max() if target.numel() else target.new_zeros(())
        if float(missed) > 1e-4:
            raise ModhifiError("the writer's input does not separate the forgotten classes; leave the writer out")
    change = basis @ predict.T
    if scale is not None:
        scale = scale.double()
        dead = scale.abs() <= SCALE_FLOOR * scale.abs().median()
        change = torch.where(dead[:, None], 0.0, change / torch.where(dead, 1.0, scale)[:, None])
    return Edit(original - change, change @ retain_mean[:width] if centred else None, used)


def stress_classes(gram: Tensor, mean: Tensor, class_means: Tensor, shares: Tensor, weight: float) -> Tensor:
    """The Gram ``(d, d)`` of the retained samples with the spread of their class means counted ``1 + weight`` times.

    ``class_means`` ``(k, d)`` with ``shares`` ``(k,)``. An edit by :func:`erase_writers` takes from a sample as much as
    it looks like the forgotten class, and the classes most like that one pay; with a ``weight`` their means are kept
    where they are, as far as they do not coincide with the forgotten one's. Source: ours.
    """
    gaps = (class_means.double() - mean.double()) * shares.double().sqrt()[:, None]
    return torch.addmm(gram.double(), gaps.T, gaps, alpha=weight)


def edit(writer: WriterOfStream) -> Edit:
    """The full edit of a writer, from the moments of its input and its stream."""
    retain, *forgotten = writer.joint.moments
    mean, settings = retain.mean[0], writer.settings
    gram = stress_classes(retain.gram[0], mean, writer.joint.class_means, writer.joint.shares, settings.class_weight)
    return erase_writers(
        writer.weight,
        torch.stack([m.mean[0] for m in forgotten]),
        torch.stack([m.gram[0] for m in forgotten]),
        mean,
        gram,
        scale=writer.scale,
        forget_weight=settings.forget_weight,
        exact=settings.exact,
        centred=writer.centred,
        damping=settings.damping,
    )


METHODS.register(
    WriterMethod(
        "erase-writers",
        "the last operator of a branch subtracts the class from the residual stream",
        Defaults(3, 3, 1.0, WHOLE),
        edit,
        # Where no activation bends what is written nothing is left for a second pass, and a third block costs the other
        # classes more than it takes from the forgotten one (eval/results/unlearn_swin.md).
        straight=Defaults(2, 1, 1.0, WHOLE),
        source="ours; its target is that of LEACE, Belrose et al. 2023",
    )
)
