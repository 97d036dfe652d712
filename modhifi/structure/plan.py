"""A plan says which components stay. It is JSON: what a dry run prints, what a recipe can replay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.structure.groups import Group, Structure


@dataclass(frozen=True)
class Plan:
    """``kept`` maps a group's name to the sorted components that stay; groups that lose nothing are left out.

    ``removal_cost`` is the squared local error predicted for each group.
    """

    kept: dict[str, tuple[int, ...]]
    removal_cost: dict[str, float] = field(default_factory=dict)

    def mask(self, group: Group) -> Tensor:
        """bool ``(n,)``: True for the components that stay."""
        if group.name not in self.kept:
            return torch.ones(group.n, dtype=torch.bool)
        mask = torch.zeros(group.n, dtype=torch.bool)
        return mask.index_fill_(0, torch.tensor(self.kept[group.name], dtype=torch.int64), True)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return {"kept": {k: list(v) for k, v in self.kept.items()}, "removal_cost": dict(self.removal_cost)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`."""
        return cls({k: tuple(v) for k, v in data["kept"].items()}, dict(data.get("removal_cost", {})))

    def check(self, structure: Structure) -> None:
        """Raise :class:`ModhifiError` where the plan does not fit the model it is applied to."""
        groups = {g.name: g for g in structure.groups}
        for name, kept in self.kept.items():
            if name not in groups:
                raise ModhifiError(f"the plan names a group '{name}' that this model lacks; is it the same model?")
            group = groups[name]
            if group.refused is not None:
                raise ModhifiError(f"'{name}' cannot be pruned: {group.refused}; take it out of the plan")
            inside = all(0 <= component < group.n for component in kept)
            if (not kept and group.least) or not inside or len(set(kept)) != len(kept):
                raise ModhifiError(f"the plan keeps components of '{name}' that do not exist; is it the same model?")
            if group.partition is not None:
                counts = torch.bincount(group.partition[list(kept)], minlength=int(group.partition.max()) + 1)
                if len(set(counts[group.partition.unique()].tolist())) > 1:
                    raise ModhifiError(f"the plan keeps unequal shares of the parts of '{name}'; keep as many in each")
