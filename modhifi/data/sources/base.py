"""What every source of samples says of itself, and where it registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modhifi.progress import Progress, silent
from modhifi.registry import Registry

# The command line lists the sources, so neither this file nor one of theirs imports torch before it is needed.
if TYPE_CHECKING:
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel

# Kinds of model (see :class:`modhifi.models.loaded.LoadedModel`) by what they take.
IMAGE_KINDS = ("image", "tensor")
TEXT_KINDS = ("text", "encoder")
# Of these every model has parts (see :mod:`modhifi.models.parts`), and of those that read several inputs some.
PART_KINDS = ("audio", "series", "tensor")


@dataclass(frozen=True)
class Request:
    """How many samples are wanted, at most ``n``, and how they are chosen.

    ``seed`` chooses and orders. ``balanced`` spreads drawn images over the classes that a classifier predicts.
    ``window`` is the number of tokens of a text; None for the default.
    """

    n: int
    seed: int = 0
    balanced: bool = True
    window: int | None = None
    progress: Progress = silent


@dataclass(frozen=True)
class SampleSource:
    """A kind of data that a string names.

    ``metavar`` is the string's form: ``name:ARGUMENT``, ``name[:ARGUMENT]`` where the argument may be left out, or the
    name alone. ``kinds`` of model are those that it has samples for. ``load`` takes the argument (empty if left out),
    the model and the request; it raises ModhifiError where nothing can be read, and for a model of another kind.
    ``source`` names the paper.
    """

    name: str
    metavar: str
    summary: str
    kinds: tuple[str, ...]
    load: Callable[[str, LoadedModel, Request], Samples]
    source: str = ""

    def takes(self, argument: str) -> bool:
        """Whether the form allows the argument, empty for none."""
        if argument:
            return self.metavar != self.name
        return not self.metavar.startswith(f"{self.name}:")


SOURCES: Registry[SampleSource] = Registry("data source")


def metavars(*kinds: str) -> str:
    """The forms that a source string may have, as a list in words; with ``kinds`` those that serve one of them."""
    forms = [s.metavar for s in SOURCES.values() if not kinds or set(kinds) & set(s.kinds)]
    return " or ".join([*([", ".join(forms[:-1])] if forms[1:] else []), *forms[-1:]])
