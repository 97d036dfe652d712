"""Where a network can be made to forget: what writes into its residual stream, and what reads, from one forward pass.

A *writer* is the last operator of a residual branch: conv (and its BatchNorm), or linear map (and its layer scale),
whose output is added to the skip. Behind the last addition, and in nets without any, every operator but the classifier
is a writer of its own output. Beside each writer stands the map from the positions of its output to those of the
stream, followed element by element through every view, permutation, roll and window of the branch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.structure.operators import columns_of, conv_groups, outputs_of
from modhifi.structure.tracing.branches import BranchWatcher, Trail, stream_places, watch

# A Gram of more columns than this takes over half a gigabyte.
MOST_COLUMNS = 8192


@dataclass(frozen=True)
class Site:
    """An operator in its block; ``sink`` is ``"bias"``, the BatchNorm behind it, or None: what takes a mean."""

    module: str
    block: str
    sink: str | None


@dataclass(frozen=True)
class Writer:
    """An operator that writes into a stream.

    The stream is the result of call number ``call`` of a forward pass: the addition that joins the branch to the skip
    (``joined``) or the operator's own output behind its norm, and behind the activation where one follows at once, for
    that is what is read (``bent``). ``norm`` is the BatchNorm and ``gains`` are the parameters (layer scales) between.
    ``rows`` is int64 ``(positions, out)``: the element of one sample's flattened stream that each output element of
    the operator ends up in, -1 for positions that are cut away before. ``wide``: its rows and the stream's have too
    many columns for a Gram.
    """

    site: Site
    norm: str | None
    gains: tuple[str, ...]
    call: int
    joined: bool
    rows: Tensor
    wide: bool = False
    bent: bool = False


@dataclass(frozen=True)
class Sites:
    """The operators of a classifier in execution order, its blocks in order, its writers, norms and classifiers.

    ``focus`` int64: the only positions of the last stream that the classifier reads (a class token), or None for all.
    ``refused``: additions that no writer was found for, with the reason.
    """

    readers: tuple[Site, ...]
    writers: tuple[Writer, ...]
    norms: tuple[tuple[str, str], ...]
    heads: tuple[str, ...]
    focus: Tensor | None
    refused: tuple[tuple[str, str], ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that hold a writer, from the input to the head."""
        return tuple(dict.fromkeys(w.site.block for w in self.writers))

    @property
    def straight(self) -> bool:
        """Whether no activation bends what is written near the end, as in pre-norm transformers."""
        return not any(w.bent for w in self.writers if w.site.block in self.last(3))

    def last(self, depth: int) -> tuple[str, ...]:
        """The last ``depth`` blocks, all of them if there are fewer."""
        return self.blocks[-depth:] if depth > 0 else ()


def find_sites(loaded: LoadedModel) -> Sites:
    """Watch one forward pass of a classifier on two example inputs.

    Raises ModhifiError for a model that is no classifier: one whose output is not ``(batch, classes)`` with at least
    two classes, written by a linear operator.
    """
    if loaded.kind == "text":
        raise ModhifiError(f"{loaded.source} is a language model: it has no classes to forget; give a classifier")
    model = loaded.model
    watcher, logits = watch(model, loaded.example_of_two(), loaded.logits)
    if logits.ndim != 2 or logits.shape[1] < 2 or not watcher.operators:
        raise ModhifiError(
            f"{loaded.source} has outputs {tuple(logits.shape[1:])} and no classes to forget; give a classifier of at "
            "least two classes"
        )
    return _assemble(model, watcher, logits)


def _assemble(model: nn.Module, watcher: BranchWatcher, logits: Tensor) -> Sites:
    # Two classifiers may be averaged: that addition is no stream.
    additions = [a for a in watcher.additions if a.size > logits.shape[1]]
    final = additions[-1].time if additions else -1
    order = sorted(watcher.operators.items(), key=lambda item: item[1][0])
    tail = [name for name, (time, *_) in order if time > final]
    classes = logits.shape[1]
    heads = tuple(n for n in tail if watcher.operators[n][2] == outputs_of(model.get_submodule(n)) == classes)
    if not heads:
        raise ModhifiError("the classifier of this model was not found: its output comes from no linear operator")

    written: list[tuple[int, Writer]] = []
    refused: list[tuple[str, str]] = []

    def add(module: str, time: int, trail: Trail, joined: bool, size: int) -> None:
        layer = model.get_submodule(module)
        if conv_groups(layer) > 1:
            refused.append((module, "it is a grouped convolution"))
        elif outputs_of(layer) > MOST_COLUMNS // 2:
            refused.append((module, f"its {outputs_of(layer)} outputs are too many"))
        else:
            site = Site(module, block_of(module), _sink(watcher, module))
            rows = stream_places(model, watcher, module, trail, size)
            origin = time if joined else module
            wide = columns_of(layer)[1] + rows.shape[1] > MOST_COLUMNS
            bent = origin in watcher.bent
            written.append(
                (time, Writer(site, trail.norm, trail.gains, watcher.read[origin], joined, rows, wide, bent))
            )

    for a in additions:
        if a.trail is None or a.trail.module is None:
            refused.append((a.where, "no operator alone writes the branch that is added here"))
        else:
            add(a.trail.module, a.time, a.trail, True, a.size)
    for name in tail:
        if name not in heads:
            add(name, watcher.operators[name][0], watcher.ends[name], False, watcher.operators[name][2])

    # An operator belongs to the next writer's block; what comes behind the last writer stands alone.
    def block(name: str, time: int) -> str:
        return next((w.site.block for t, w in written if t >= time), block_of(name))

    readers = tuple(Site(n, block(n, entry[0]), _sink(watcher, n)) for n, entry in order)
    norms = tuple((n, block(n, time)) for n, time in sorted(watcher.batchnorms.items(), key=lambda item: item[1]))
    behind = [trail for name in tail if (trail := watcher.operators[name][3]) is not None]
    return Sites(readers, tuple(w for _, w in written), norms, heads, _focus(behind, written), tuple(refused))


def block_of(module: str) -> str:
    """The innermost numbered ancestor of a module (``layer4.1`` of ``layer4.1.conv2``), itself if there is none."""
    parts = module.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else module


def _sink(watcher: BranchWatcher, module: str) -> str | None:
    return "bias" if watcher.operators[module][1] else watcher.sinks.get(module)


def _focus(behind: list[Trail], written: list[tuple[int, Writer]]) -> Tensor | None:
    """The positions of the last stream that reach an operator behind it, where they are some and not all."""
    streams = [(time, w) for time, w in written if w.joined]
    places = [t.index.reshape(2, -1)[0] for t in behind if streams and t.origin == streams[-1][0]]
    if not places:
        return None
    read = torch.isin(streams[-1][1].rows, torch.cat(places)).all(1)
    return None if bool(read.all()) or not bool(read.any()) else torch.nonzero(read).flatten()
