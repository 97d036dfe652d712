"""Components that live or die together: what a traced model couples, as plain index arrays.

A *component* is the unit that can be removed: a channel, a neuron, a head. A *group* is a set of components with the
same producers and readers. Everything downstream (moments, selection, surgery) works on these dataclasses alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

Role = Literal["producer", "reader", "along", "rows", "biases", "matrices", "argument"]
Kind = Literal["channels", "neurons", "heads", "experts", "ranks", "blocks", "sublayers"]


@dataclass(frozen=True)
class Slice:
    """Where a group's components stand in one module.

    ``index`` is int64 ``(n, m)``: the ``m`` channel positions of each of the ``n`` components, on the output axis of a
    producer, on the input axis of a reader, on the only channel axis of a module (or parameter) that the components
    pass along (a norm, a depthwise conv, a layer scale), on the axis ``dim`` of a table with ``rows`` for them, in the
    flattened ``biases`` ``(E, width)`` of stacked
    matrices, on the first axis of a tensor with something for each expert (``matrices``). With the role ``argument``
    ``module`` is a module's name and that of an argument of its forward, on whose axis ``dim`` they stand.
    """

    module: str
    role: Role
    index: Tensor
    dim: int = 0


@dataclass(frozen=True)
class Branch:
    """A residual branch: what one operator, its ``writer``, adds to a stream.

    ``block`` is the element of a list of modules that it lies in, ``part`` the module inside whose output is the
    branch and nothing else, None where there is none, and ``outputs`` how many values that module returns. The stream
    behind the branch is the result of the ``number``-th addition that the module ``where`` makes itself. ``norm`` is
    the BatchNorm and ``gains`` are the parameters (layer scales) between writer and stream. ``place`` is int64
    ``(positions, out)``, the element of one sample's flattened stream that each output element of the writer ends up
    in, None where they are in one order.
    """

    writer: str
    block: str
    part: str | None
    outputs: int
    where: str
    number: int
    norm: str | None = None
    gains: tuple[str, ...] = ()
    place: Tensor | None = None

    @property
    def stream(self) -> str:
        """The list of modules that the block is an element of."""
        return self.block.rpartition(".")[0]


@dataclass(frozen=True)
class Group:
    """``n`` components that can be removed one by one, each from every slice at once.

    ``partition`` is int64 ``(n,)`` where equally many components must be kept per label (conv groups, chunks).
    ``refused`` says why nothing of the group may be removed. ``kind`` is ``channels``, ``neurons`` (of linear maps),
    ``heads``, ``experts``, ``ranks`` (channel i of the values of every head), ``blocks`` or ``sublayers``; ``queries``
    the number of query heads in one component, above 1 where they share a key-value head and the component is that
    whole KV group; ``experts`` the number of experts of a mixture that have as many neurons each. What stays of every
    part is a ``multiple`` of that. ``attributes`` are integers of modules that count components: ``(module, attribute,
    amount per component)``; ``pieces`` are such that count a piece of some channels, of other groups too. Blocks and
    sublayers have no slices: their components are the modules ``parts``, and all of them may go.
    """

    name: str
    n: int
    slices: tuple[Slice, ...]
    partition: Tensor | None = None
    refused: str | None = None
    kind: Kind = "channels"
    queries: int = 1
    experts: int = 1
    multiple: int = 1
    attributes: tuple[tuple[str, str, int], ...] = ()
    pieces: tuple[tuple[str, str, int], ...] = ()
    parts: tuple[str, ...] = ()

    def of(self, role: Role) -> tuple[Slice, ...]:
        """The slices of one role."""
        return tuple(s for s in self.slices if s.role == role)

    @property
    def readers(self) -> tuple[Slice, ...]:
        return self.of("reader")

    @property
    def producers(self) -> tuple[Slice, ...]:
        return self.of("producer")

    @property
    def coupled(self) -> bool:
        """Whether several producers write the components into the same places (a residual width)."""
        return len({s.module for s in self.producers}) > 1 and self.kind == "channels"

    @property
    def on_request(self) -> bool:
        """Whether components go only where they are asked for: whole modules, and ranks, which lie across heads."""
        return bool(self.parts) or self.kind == "ranks"

    @property
    def label(self) -> str:
        """The kind in words."""
        if self.kind == "heads" and self.queries > 1:
            return f"KV groups of {self.queries} heads"
        if self.experts > 1:
            return f"neurons of {self.experts} experts"
        return "coupled channels" if self.coupled else self.kind

    @property
    def least(self) -> int:
        """The least number of components that must stay."""
        return 0 if self.parts else self.step

    @property
    def step(self) -> int:
        """The least number of components that can be removed at once: ``multiple`` per label of the partition."""
        return self.multiple * (1 if self.partition is None else int(self.partition.unique().numel()))


@dataclass(frozen=True)
class Operator:
    """A conv or linear map of the model: its multiply-adds per sample and what takes the mean of its input.

    ``sink`` is ``"bias"``, the qualified name of the BatchNorm that alone reads the output, or ``None``.
    """

    module: str
    macs: int
    sink: str | None


@dataclass(frozen=True)
class Work:
    """A product of tensors that belongs to no operator, as attention: its multiply-adds per sample at full width.

    They scale with a width of ``total`` positions, of which ``positions`` maps groups to those of one component.
    """

    macs: int
    positions: Mapping[str, float]
    total: int


@dataclass(frozen=True)
class Structure:
    """Everything known of a model's couplings: groups (refused ones included) and operators by module name.

    ``macs`` are the multiply-adds per sample of one forward pass, of which operators and ``work`` have their part.
    ``uncounted`` names kernels whose work nobody can tell. ``branches`` are the residual branches in their order, where
    they were looked for.
    """

    groups: tuple[Group, ...]
    operators: dict[str, Operator] = field(default_factory=dict)
    work: tuple[Work, ...] = ()
    macs: int = 0
    uncounted: tuple[str, ...] = ()
    branches: tuple[Branch, ...] = ()

    @property
    def prunable(self) -> tuple[Group, ...]:
        return tuple(g for g in self.groups if g.refused is None)

    @property
    def refused(self) -> tuple[Group, ...]:
        return tuple(g for g in self.groups if g.refused is not None)

    @property
    def table_axes(self) -> dict[str, int]:
        """The axis on which components stand in each table that has rows for them, by the table's name."""
        return {piece.module: piece.dim for group in self.groups for piece in group.of("rows")}

    def select(self, names: Iterable[str]) -> Structure:
        """The same structure with every prunable group that is not named refused as excluded by the user."""
        wanted = set(names)
        groups = tuple(
            g if g.refused or g.name in wanted else replace(g, refused="excluded on request") for g in self.groups
        )
        return replace(self, groups=groups)

    def without(self, parts: Iterable[str]) -> Structure:
        """The same structure without the groups that lie in some modules altogether, whole ones included."""
        prefixes = tuple(f"{part}." for part in parts)

        def stays(group: Group) -> bool:
            names = [piece.module for piece in group.slices]
            return not names or not all(f"{name}.".startswith(prefixes) for name in names)

        return replace(self, groups=tuple(g for g in self.groups if stays(g)))

    def leave(self, reasons: Mapping[str, str]) -> Structure:
        """The same structure with some groups refused, each for its reason."""
        groups = tuple(replace(g, refused=reasons[g.name]) if g.name in reasons else g for g in self.groups)
        return replace(self, groups=groups)

    def read_by(self, module: str) -> tuple[str, ...]:
        """The names of the prunable groups that a module reads."""
        return tuple(g.name for g in self.prunable if any(s.module == module for s in g.readers))
