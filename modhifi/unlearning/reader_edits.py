"""Edit operators from the moments of what they read: the frame of every method that works on readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modhifi.calibration.moments import Moments
from modhifi.errors import ModhifiError
from modhifi.pruning.fidelity import singleton_fidelity
from modhifi.structure.operators import columns_of, conv_groups, weight_matrix
from modhifi.unlearning.closed_forms import Edit, pooled
from modhifi.unlearning.moments import reader_moments
from modhifi.unlearning.session import EditSession
from modhifi.unlearning.settings import Defaults
from modhifi.unlearning.sites import MOST_COLUMNS, Site


@dataclass(frozen=True)
class Reader:
    """A conv group of an operator, and the moments of what it reads.

    ``weight`` ``(out, d)``; ``retain_mean`` ``(d,)`` and ``retain_gram`` ``(d, d)``; ``forget_means`` ``(m, d)`` and
    ``forget_grams`` ``(m, d, d)``, one for each forgotten class; ``counts``: rows of the retained samples and of each
    forgotten class. ``components`` int64 ``(n, k)``: the columns of each input channel. ``centred``: whether the
    operator has a place for a mean. ``strength`` is in the method's own unit, ``damping`` in mean diagonals.
    """

    weight: Tensor
    retain_mean: Tensor
    retain_gram: Tensor
    forget_means: Tensor
    forget_grams: Tensor
    counts: tuple[float, ...]
    components: Tensor
    centred: bool
    strength: float
    damping: float

    def forgotten(self) -> tuple[Tensor, Tensor]:
        """Mean ``(d,)`` and Gram ``(d, d)`` of the forgotten classes, each with the same weight."""
        return pooled(self.forget_means, self.forget_grams, [1.0] * len(self.forget_means))

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean ``(d,)`` and Gram ``(d, d)`` of all samples."""
        means = torch.cat([self.retain_mean[None], self.forget_means])
        return pooled(means, torch.cat([self.retain_gram[None], self.forget_grams]), self.counts)

    def fidelity(self, mean: Tensor, gram: Tensor) -> Tensor:
        """The singleton fidelity ``(out, n)`` of every component on samples of these moments (arXiv 2511.19566)."""
        energy = gram - torch.outer(mean, mean) if self.centred else gram
        return singleton_fidelity(self.weight, energy, self.components)


@dataclass(frozen=True)
class ReaderMethod:
    """``edit`` is the closed form for one reader.

    ``scored_once``: all moments are those of the original, as the source has it; otherwise they are collected again
    before each edit. ``edits_classifier``: whether the classifier is among the operators.
    """

    name: str
    summary: str
    usual: Defaults
    edit: Callable[[Reader], Edit]
    source: str = ""
    scored_once: bool = False
    edits_classifier: bool = True

    def defaults(self, straight: bool) -> Defaults:
        return self.usual

    def run(self, session: EditSession) -> None:
        """Edit the readers of the last blocks, one after another, as often as ``passes`` says."""
        chosen = chosen_readers(session, self.edits_classifier)
        if self.scored_once:
            moments = reader_moments(session.start_passes(()), session.groups, [site.module for site in chosen])
            for number, site in enumerate(chosen):
                session.apply(site, [self.edit(reader) for reader in readers_of(session, site, moments[site.module])])
                session.progress("editing", number + 1, len(chosen))
            return
        total = len(chosen) * session.values.passes
        runs = session.start_passes([site.module for site in chosen])
        for number in range(total):
            site = chosen[number % len(chosen)]
            current = reader_moments(runs, session.groups, [site.module])[site.module]
            try:
                session.apply(site, [self.edit(reader) for reader in readers_of(session, site, current)])
            except ModhifiError as problem:
                session.left_out.append((site.module, str(problem)))
            session.progress("editing", number + 1, total)


def readers_of(session: EditSession, site: Site, moments: list[Moments]) -> list[Reader]:
    """The conv groups of an operator; ``moments``: one entry for each population."""
    layer: Any = session.model.get_submodule(site.module)
    weight = weight_matrix(layer).cpu()
    width = weight.shape[2]
    kernel = width // (layer.in_channels // conv_groups(layer)) if hasattr(layer, "kernel_size") else 1
    retain, *forgotten = moments
    return [
        Reader(
            weight=weight[g],
            retain_mean=retain.mean[g],
            retain_gram=retain.gram[g],
            forget_means=torch.stack([m.mean[g] for m in forgotten]),
            forget_grams=torch.stack([m.gram[g] for m in forgotten]),
            counts=tuple(float(m.n) for m in moments),
            components=torch.arange(width).view(-1, kernel),
            centred=site.sink is not None,
            strength=session.values.strength,
            damping=session.settings.damping,
        )
        for g in range(len(weight))
    ]


def chosen_readers(session: EditSession, with_classifier: bool) -> list[Site]:
    """The operators of the last blocks, or those that ``settings.only`` names.

    Those with too many columns for a Gram are left out. Raises ModhifiError where none is left.
    """
    """The operators of the last blocks; and for methods that work there also the classifier."""
    sites, only = session.sites, session.settings.only
    readers = sites.readers
    if only:
        chosen = [s for s in readers if session.wanted(s.module)]
    else:
        last = sites.last(session.values.depth) or tuple(s.block for s in readers[-4:])
        start = min((i for i, s in enumerate(readers) if s.block in last), default=0)
        chosen = [s for s in readers[start:] if with_classifier or s.module not in sites.heads]
    if not chosen:
        raise ModhifiError(f"no operator matches {', '.join(only)}; the last is {readers[-1].module}")
    wide = {s.module: columns_of(session.model.get_submodule(s.module))[1] for s in chosen}
    session.left_out += [(n, f"its {c} input columns are too many") for n, c in wide.items() if c > MOST_COLUMNS]
    fitting = [s for s in chosen if wide[s.module] <= MOST_COLUMNS]
    if not fitting:
        raise ModhifiError(
            f"{session.left_out[0][0]} cannot be edited: {session.left_out[0][1]}; choose others with --only"
        )
    return fitting
