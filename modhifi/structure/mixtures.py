"""Mixtures of experts: which tensors of a model have a row or a matrix for each expert."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from modhifi.structure.groups import Group, Slice, Structure
from modhifi.structure.places import holder
from modhifi.structure.stacked import TURNED

# Integers that count experts: num_experts, num_local_experts, n_routed_experts, and a linear router's width.
COUNTS = re.compile(r"(experts|^out_features)$")
# Parts of equal size among which a router chooses first, and the experts that it chooses for a token.
PARTS, CHOSEN = re.compile(r"^(num|n)_(expert_)?groups?$"), re.compile(r"^(top_?k|num_experts_per_tok)$")


@dataclass(frozen=True)
class Mixture:
    """A ``block`` of experts and their router, the name of a module; a component of ``group`` is an expert.

    ``reader`` names the operator that reads the neurons of all of them; ``chosen`` is how many experts a token has.
    """

    block: str
    reader: str
    group: Group
    chosen: int

    @property
    def own(self) -> Structure:
        """The group as a structure of the block alone."""
        pieces = (replace(s, module=self.inside(s.module)) for s in self.group.slices)
        attributes = ((self.inside(module), name, amount) for module, name, amount in self.group.attributes)
        return Structure((replace(self.group, slices=tuple(pieces), attributes=tuple(attributes)),))

    def inside(self, name: str) -> str:
        """A name of the model as the block knows it."""
        return name.removeprefix(self.block).removeprefix(".")


def mixtures(model: nn.Module, structure: Structure) -> tuple[Mixture, ...]:
    """The mixtures of a traced model, in order, whose router has a row for each expert.

    An expert is a component: it goes with its matrices, its row of the router and whatever else that one has for it.
    """
    return tuple(
        mixture
        for neurons in structure.groups
        if neurons.experts > 1 and neurons.readers and (mixture := _mixture(model, neurons)) is not None
    )


def _mixture(model: nn.Module, neurons: Group) -> Mixture | None:
    owner = neurons.readers[0].module.removesuffix(TURNED).rpartition(".")[0]
    block, count = owner.rpartition(".")[0], neurons.experts
    around = {
        f"{block}.{name}".strip("."): module
        for name, module in model.get_submodule(block).named_modules()
        if not f"{block}.{name}".strip(".").startswith(f"{owner}.")
    }
    tensors = [name for path, module in around.items() for name in _tensors(path, module, count, path == owner)]
    routers = [name for name in tensors if name.rpartition(".")[0] != owner and _at(model, name).ndim == 2]
    if len(routers) != 1:
        return None
    router = routers[0].rpartition(".")[0]
    tensors = [name for name in tensors if name.rpartition(".")[0] in (owner, router, block)]
    everyone = torch.arange(count)[:, None]
    integers = {path: dict(_integers(module)) for path, module in around.items() if path in (owner, router, block)}
    attributes = [
        (path, name, 1)
        for path, values in integers.items()
        for name, value in values.items()
        if value == count and COUNTS.search(name)
    ]
    chosen = {value for values in integers.values() for name, value in values.items() if CHOSEN.search(name)}
    parts = max((v for values in integers.values() for name, v in values.items() if PARTS.search(name)), default=1)
    group = Group(
        owner,
        count,
        tuple(Slice(name, "matrices", everyone) for name in tensors),
        partition=torch.arange(count) // (count // parts) if parts > 1 and count % parts == 0 else None,
        kind="experts",
        attributes=tuple(attributes),
    )
    return Mixture(block, neurons.readers[0].module, group, max(chosen, default=1))


def _tensors(path: str, module: nn.Module, count: int, stacked: bool) -> Iterator[str]:
    """The names of a module's own tensors with a row, or a matrix, for each expert."""
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.ndim and len(tensor) == count and (stacked or tensor.ndim <= 2):
            yield f"{path}.{name}".strip(".")


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    yield from ((name, value) for name, value in vars(module).items() if type(value) is int)


def _at(model: nn.Module, name: str) -> Tensor:
    value: Tensor = getattr(*holder(model, name))
    return value
