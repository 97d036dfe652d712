"""From watched operations to groups: which channel numbers are one component, and which components share a fate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modhifi.structure.groups import Group, Kind, Role, Slice, Work
from modhifi.structure.splits import Count, Split, fate_of

# Behind the name of a table whose rows are channels, and of an argument that has an axis of them.
ROWS, ARGUMENT = "[rows]", "[argument]"
# What components are by what they are marked with, of several marks by the first.
KINDS: dict[str, Kind] = {"ranks": "ranks", "heads": "heads", "sum": "channels"}


@dataclass(frozen=True)
class Event:
    """Channel numbers met at one place, a module or a parameter.

    ``parts`` asks for equal counts in every part; ``reason`` refuses them. ``mark`` is ``"sum"`` where channels are
    added to others, ``"heads"`` where they are batch axes of a product of tensors, and ``"ranks"`` where they are its
    columns inside heads. ``count`` is the integer of a module that says how many they are, ``dim`` the axis of an
    argument or of a table that they stand on.
    """

    place: str
    role: Role | None
    ids: Tensor
    parts: int = 1
    reason: str | None = None
    mark: str | None = None
    count: Count | None = None
    dim: int = 0


class Couplings:
    """Collects what a trace sees. Channel numbers ("atoms") are handed out by :meth:`produce` and :meth:`parameter`."""

    def __init__(self) -> None:
        self.count = 0
        self.events: list[Event] = []
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.made: dict[str, Tensor] = {}
        self.loose: set[int] = set()
        self.work: list[tuple[int, Tensor]] = []
        self.splits: list[Split] = []
        # The components of each group, by their labels, once groups are made.
        self.members: dict[str, np.ndarray] = {}

    def fresh(self, width: int) -> Tensor:
        """New channel numbers: int64 ``(width,)``."""
        self.count += width
        return torch.arange(self.count - width, self.count)

    def produce(self, module: str, width: int, parts: int) -> Tensor:
        """New channels written by ``module``; called twice, the same ones."""
        if module not in self.made:
            self.made[module] = self.fresh(width)
            self.events.append(Event(module, "producer", self.made[module], parts))
        return self.made[module]

    def parameter(self, name: str, width: int) -> Tensor:
        """New channels of a parameter's own; asked for twice, the same ones."""
        if name not in self.made:
            self.made[name] = self.fresh(width)
            self.loose.update(self.made[name].tolist())
            self.events.append(Event(name, "along", self.made[name]))
        return self.made[name]

    def rows(self, name: str, width: int, dim: int = 0) -> Tensor:
        """New channels along an axis of a parameter, a table; asked for twice, the same ones."""
        key = f"{name}{ROWS}"
        if key not in self.made:
            self.made[key] = self.fresh(width)
            self.loose.update(self.made[key].tolist())
            self.events.append(Event(name, "rows", self.made[key], dim=dim))
        return self.made[key]

    def argument(self, name: str, dim: int, width: int) -> Tensor:
        """New channels along one axis of an argument of a module; asked for twice, the same ones."""
        key = f"{name}{ARGUMENT}"
        if key not in self.made:
            self.made[key] = self.fresh(width)
            self.loose.update(self.made[key].tolist())
            self.events.append(Event(name, "argument", self.made[key], dim=dim))
        return self.made[key]

    def parameter_of(self, ids: Tensor) -> str | None:
        """The parameter whose own channels these are, along its last wide axis."""
        own = (name for name, made in self.made.items() if torch.equal(made, ids) and self.is_loose(ids))
        return next((name for name in own if not name.endswith((ROWS, ARGUMENT))), None)

    def is_loose(self, ids: Tensor) -> bool:
        """Whether these are a parameter's own channels, which no operator has produced."""
        return self.loose.issuperset(ids.tolist())

    def _meet(self, place: str, role: Role, ids: Tensor, parts: int = 1) -> None:
        for event in self.events:
            if event.place == place and event.role == role:
                if len(event.ids) == len(ids):
                    self.unite(event.ids, ids)
                else:
                    self.freeze(ids, f"{place} is used with two widths")
                return
        self.events.append(Event(place, role, ids, parts))

    def read(self, module: str, ids: Tensor, parts: int) -> None:
        """A module reads these channels, in ``parts`` conv groups."""
        self._meet(module, "reader", ids, parts)

    def along(self, module: str, ids: Tensor) -> None:
        """These channels pass a module with values of its own for each of them."""
        self._meet(module, "along", ids)

    def chunk(self, ids: Tensor, parts: int) -> None:
        """As many of these channels must stay in every one of ``parts`` equal chunks."""
        self.events.append(Event("chunk", None, ids, parts))

    def part(self, ids: Tensor, count: Count | None) -> None:
        """These channels are apart from all others; ``count`` says how many they are."""
        self.events.append(Event("a part", None, ids, count=count))

    def settle_splits(self) -> None:
        """Decide, now that everything has been seen, what becomes of every split, in the order of the pass."""
        for split in self.splits:
            label = self.components()
            fate = fate_of(split, label, lambda label=label: self._family_of_each(label))  # type: ignore[misc]
            for first, other in fate.unite:
                self.unite(first, other)
            for piece, count in fate.apart:
                self.part(piece, count)
            if fate.parts is not None:
                self.chunk(fate.parts, len(split.pieces))
            if fate.freeze:
                self.freeze(split.ids[split.ids >= 0], split.reason)
        self.splits.clear()

    def mark(self, ids: Tensor, mark: str) -> None:
        """Note what these channels are used for; see :class:`Event`."""
        self.events.append(Event(mark, None, ids, mark=mark))

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Let position i of ``a`` and of ``b`` share one fate; -1 stands for a channel that must stay."""
        alone = torch.cat([a[(b < 0) & (a >= 0)], b[(a < 0) & (b >= 0)]])
        if len(alone):
            self.freeze(alone, "these channels are combined with channels that must stay")
        both = (a >= 0) & (b >= 0)
        self.edges.append((a[both], b[both]))

    def spend(self, macs: int, ids: Tensor) -> None:
        """Multiply-adds of an operation scale with the number of these channels."""
        self.work.append((macs, ids[ids >= 0]))

    def are_heads(self, ids: Tensor) -> bool:
        """Whether all of these channels were seen as batch axes of a product of tensors."""
        return any(e.mark == "heads" and bool(torch.isin(ids, e.ids).all()) for e in self.events)

    def freeze(self, ids: Tensor, reason: str) -> None:
        """These channels must stay, for a reason that is printed."""
        self.events.append(Event("frozen", None, ids, reason=reason))

    def freeze_everything(self, reason: str) -> None:
        """All channels so far must stay."""
        self.freeze(torch.arange(self.count), reason)

    # -- assembling ------------------------------------------------------------------------------------------------
    def components(self) -> np.ndarray:
        """Component label of every atom: the least atom number it is coupled with."""
        label = np.arange(self.count)
        if not self.edges:
            return label
        a = torch.cat([e[0] for e in self.edges]).numpy()
        b = torch.cat([e[1] for e in self.edges]).numpy()
        while True:
            low = np.minimum(label[a], label[b])
            before = label.copy()
            np.minimum.at(label, a, low)
            np.minimum.at(label, b, low)
            np.minimum.at(label, before[a], low)
            np.minimum.at(label, before[b], low)
            label = label[label]
            if (label == before).all():
                return label

    def groups(self) -> tuple[Group, ...]:
        """Components with the same producers, readers and fate, as groups in order of first production."""
        self.settle_splits()
        label = self.components()
        groups: dict[str, Group] = {}
        for key, members in self._families(label).items():
            signature = np.frombuffer(key, dtype=np.int64).reshape(-1, 2).tolist()
            group = self._group(signature, np.array(members), label)
            if group is not None:
                same = sum(name.partition("#")[0] == group.name for name in groups)
                name = f"{group.name}#{same + 1}" if same else group.name
                groups[name] = replace(group, name=name)
                self.members[name] = np.array(members)
        return tuple(groups.values())

    def _family_of_each(self, label: np.ndarray) -> np.ndarray:
        """The number of the family that each component is in, by its label; families as :meth:`_families` has them."""
        number = np.zeros(self.count, dtype=np.int64)
        for at, members in enumerate(self._families(label).values()):
            number[members] = at
        return number

    def _families(self, label: np.ndarray) -> dict[bytes, list[int]]:
        """The components that meet the same events as often, by these events and counts."""
        # Rows of component, event and count, those of a component together.
        met = [np.empty((3, 0), dtype=np.int64)]
        for number, event in enumerate(self.events):
            ids = event.ids.numpy()
            components, counts = np.unique(label[ids[ids >= 0]], return_counts=True)
            met.append(np.stack([components, np.full_like(components, number), counts]))
        rows = np.concatenate(met, axis=1).T
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        components, starts = np.unique(rows[:, 0], return_index=True)
        places, ends = np.ascontiguousarray(rows[:, 1:]), np.append(starts[1:], len(rows))[: len(starts)]
        families: dict[bytes, list[int]] = {}
        for component, start, end in zip(components.tolist(), starts.tolist(), ends.tolist(), strict=True):
            families.setdefault(places[start:end].tobytes(), []).append(component)
        return families

    def shared_work(self, samples: int) -> tuple[Work, ...]:
        """The work that was spent, by the groups that it scales with, per sample of ``samples``."""
        label, result = self.components(), []
        for macs, ids in self.work:
            counts = np.bincount(label[ids.numpy()], minlength=self.count)
            positions = {name: float(counts[members].mean()) for name, members in self.members.items()}
            result.append(Work(macs // samples, {name: p for name, p in positions.items() if p}, len(ids)))
        return tuple(result)

    def _group(self, signature: list[list[int]], members: np.ndarray, label: np.ndarray) -> Group | None:
        slices: list[Slice] = []
        reasons: list[str] = []
        marks: dict[str, int] = {}
        partition: np.ndarray | None = None
        pieces: list[tuple[str, str, int]] = []
        for number, count in signature:
            event = self.events[number]
            if event.reason is not None:
                reasons.append(event.reason)
                continue
            if event.mark is not None:
                marks[event.mark] = max(count, marks.get(event.mark, 0))
                continue
            owner = np.where(event.ids.numpy() >= 0, label[event.ids.numpy()], -1)
            positions = np.flatnonzero(np.isin(owner, members))
            order = np.argsort(owner[positions], kind="stable")
            index = positions[order].reshape(len(members), count)
            if event.count is not None:
                pieces.append((*event.count, count))
            if event.role is not None:
                slices.append(Slice(event.place, event.role, torch.from_numpy(index), event.dim))
            if event.role == "argument" and index.size < len(event.ids):
                reasons.append(f"{event.place} holds something for other heads as well")
            if event.parts > 1:
                partition, reason = _refine(partition, index // (len(owner) // event.parts), event)
                if reason:
                    reasons.append(reason)
        producers = [s for s in slices if s.role == "producer"]
        if not producers:
            return None
        if not reasons and not any(s.role == "reader" for s in slices):
            reasons.append("nothing that modhifi can edit reads these channels")
        if not reasons and len(members) < 2 * (1 if partition is None else len(np.unique(partition))):
            reasons.append("a single component, or one in each part, cannot be removed")
        return Group(
            name=producers[0].module,
            n=len(members),
            slices=tuple(slices),
            partition=None if partition is None else torch.from_numpy(partition),
            refused="; ".join(dict.fromkeys(reasons)) or None,
            kind=next((kind for mark, kind in KINDS.items() if mark in marks), "neurons"),
            queries=marks.get("heads", 1),
            pieces=tuple(dict.fromkeys(pieces)),
        )


def _refine(old: np.ndarray | None, parts: np.ndarray, event: Event) -> tuple[np.ndarray | None, str | None]:
    """Add the wish for equal counts per part to a partition: ``parts`` is ``(n, m)``, part of each position."""
    place = event.place if event.role else "a chunk"
    each, left = divmod(parts.shape[1], event.parts)
    if not left and event.role != "reader" and (np.sort(parts, axis=1) == np.arange(event.parts).repeat(each)).all():
        return old, None  # every component stands in every part alike
    if (parts != parts[:, :1]).any():
        return old, f"a component spans several conv groups of {place}"
    new = parts[:, 0]
    counts = np.bincount(new, minlength=event.parts)
    if (counts != counts[0]).any():
        return old, f"the conv groups of {place} hold different numbers of these components"
    if old is None:
        return new.copy(), None
    pairs = np.unique(np.stack([old, new]), axis=1)
    for finer, coarser in ((old, new), (new, old)):
        if len(np.unique(finer)) == pairs.shape[1] and len(np.unique(finer)) % len(np.unique(coarser)) == 0:
            return finer.copy(), None
    return old, f"{place} and another operation divide these components differently"
