"""Edit operators from the moments of what they read and of the stream they write into: the frame of such methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.calibration.prefix_cache import Passes
from modhifi.errors import ModhifiError
from modhifi.structure.operators import weight_matrix
from modhifi.unlearning.closed_forms import Edit
from modhifi.unlearning.moments import Joint, joint_moments
from modhifi.unlearning.session import EditSession
from modhifi.unlearning.settings import Defaults, UnlearnSettings
from modhifi.unlearning.sites import Writer
from modhifi.unlearning.wide import spanned_moments


@dataclass(frozen=True)
class WriterOfStream:
    """A writer's weight ``(out, d)`` and the ``joint`` moments of its input and its stream.

    ``scale`` ``(out,)``: what stands between the writer's output and the stream, None for nothing. ``centred``: whether
    the operator has a place for a mean.
    """

    weight: Tensor
    joint: Joint
    scale: Tensor | None
    centred: bool
    settings: UnlearnSettings


@dataclass(frozen=True)
class WriterMethod:
    """``edit`` is the closed form for one writer; ``straight`` applies where no activation bends what is written."""

    name: str
    summary: str
    usual: Defaults
    edit: Callable[[WriterOfStream], Edit]
    straight: Defaults
    source: str = ""

    def defaults(self, straight: bool) -> Defaults:
        return self.straight if straight else self.usual

    def run(self, session: EditSession) -> None:
        """Edit the writers of the last blocks, one after another with fresh moments, as often as ``passes`` says."""
        chosen = chosen_writers(session)
        total = session.values.passes * len(chosen)
        runs = session.start_passes([writer.site.module for writer in chosen])
        for number in range(total):
            writer = chosen[number % len(chosen)]
            weight = weight_matrix(session.model.get_submodule(writer.site.module))[0].cpu()
            try:
                full = self._solve(session, runs, writer, weight)
            except ModhifiError as problem:
                session.left_out.append((writer.site.module, str(problem)))
            else:
                session.apply(writer.site, [full.blend(weight, session.values.strength)])
            session.progress("editing", number + 1, total)
        if not session.records:
            raise ModhifiError(f"no writer could be edited: {session.left_out[0][1]}; try --method erase")

    def _solve(self, session: EditSession, runs: Passes, writer: Writer, weight: Tensor) -> Edit:
        assert session.samples.labels is not None

        def solved(weight: Tensor, joint: Joint) -> Edit:
            scale, centred = writer_scale(session.model, writer), writer.site.sink is not None
            return self.edit(WriterOfStream(weight, joint, scale, centred, session.settings))

        where = (runs, session.groups, session.samples.labels, writer, session.sites.focus)
        if not writer.wide:
            return solved(weight, joint_moments(*where))
        spanned = spanned_moments(*where)
        change = solved(weight.new_zeros(len(weight), len(spanned.factor)), spanned.joint)
        return replace(change, weight=weight.double() + spanned.lift(change.weight))


def chosen_writers(session: EditSession) -> list[Writer]:
    """The writers of the last blocks, or those that ``settings.only`` names.

    Raises ModhifiError where there is none.
    """
    last = session.sites.last(session.values.depth)
    writers = session.sites.writers
    if session.settings.only:
        chosen = [w for w in writers if session.wanted(w.site.module)]
    else:
        chosen = [w for w in writers if w.site.block in last]
    if not chosen:
        refused = session.sites.refused[-2:] or (("", "it has no addition, and nothing but a classifier"),)
        # What is added in the model's own forward has no name.
        reasons = "; ".join(f"{name}: {reason}" if name else reason for name, reason in refused)
        names = ", ".join(w.site.module for w in writers[-4:])
        detail = f"the last ones are {names}" if names else f"this model has none ({reasons})"
        raise ModhifiError(f"no writer to edit: {detail}; choose others with --only, or --method erase")
    return chosen


def writer_scale(model: nn.Module, writer: Writer) -> Tensor | None:
    """What stands between a writer's output and the stream, float64 ``(out,)``; None for nothing.

    Raises ModhifiError for a BatchNorm that divides by the spread of each batch.
    """
    scale: Tensor | None = None
    if writer.norm is not None:
        norm: Any = model.get_submodule(writer.norm)
        if norm.running_var is None:
            raise ModhifiError(
                f"the BatchNorm {writer.norm} behind {writer.site.module} keeps no statistics "
                "(track_running_stats=False)"
            )
        gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        scale = gamma.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    for name in writer.gains:
        gain = model.get_parameter(name).detach().double().flatten()
        scale = gain if scale is None else scale * gain
    return None if scale is None else scale.cpu()
