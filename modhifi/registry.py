"""The registry of one kind of thing: a selector, a data source, an attack is one small file that registers itself.

Recipes, the command line and the docs list the entries of a registry, so that a new entry takes one new file.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Generic, Protocol, TypeVar

from modhifi.errors import ModhifiError


class Entry(Protocol):
    """An entry of a registry: ``summary`` describes it in one line, ``source`` names its paper, empty for ours."""

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def source(self) -> str: ...


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E], Generic[E]):
    """The entries of one kind by name, in the order in which they were registered.

    ``kind`` names an entry in errors, in the singular: "selector". ``modules`` names the one that registered each.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.entries: dict[str, E] = {}
        self.aliases: dict[str, str] = {}
        self.modules: dict[str, str] = {}

    def register(self, entry: E, *aliases: str) -> E:
        """Adds an entry under its name and its aliases; raises ModhifiError for a name that is taken."""
        for name in (entry.name, *aliases):
            if name in self.entries or name in self.aliases:
                raise ModhifiError(f"there is a {self.kind} '{name}' already; give another name")
        self.entries[entry.name] = entry
        # The caller's, as files of one package import each other while they are discovered.
        self.modules[entry.name] = sys._getframe(1).f_globals["__name__"]
        self.aliases |= dict.fromkeys(aliases, entry.name)
        return entry

    def discover(self, package: str) -> None:
        """Imports every file of a package, in the order of their names; each registers its entries."""
        path = importlib.import_module(package).__path__
        for module in sorted(pkgutil.iter_modules(path), key=lambda m: m.name):
            importlib.import_module(f"{package}.{module.name}")

    @property
    def names(self) -> tuple[str, ...]:
        """Every valid name, aliases last."""
        return (*self.entries, *self.aliases)

    def __getitem__(self, name: str) -> E:
        """The entry of a name or alias; raises ModhifiError, with the nearest name, for an unknown one."""
        if self.aliases.get(name, name) not in self.entries:
            raise ModhifiError(f"{self.unknown(name)}")
        return self.entries[self.aliases.get(name, name)]

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def unknown(self, name: object) -> str:
        """The error message for a name that is not registered."""
        nearest = difflib.get_close_matches(str(name), self.names, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"choose one of {', '.join(self.names)}"
        return f"unknown {self.kind} '{name}'; {hint}"


def one_of(registry: Registry[Any]) -> Any:
    """The type of a recipe's field that takes a name of a registry, also of an entry that is registered later."""
    # The command line lists entries without any recipe.
    from pydantic import AfterValidator, WithJsonSchema

    def known(name: str) -> str:
        if name not in registry:
            raise ValueError(registry.unknown(name))
        return name

    return Annotated[str, AfterValidator(known), WithJsonSchema({"type": "string", "enum": list(registry.names)})]
