"""The settings of a bench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from modhifi.registry import one_of
from modhifi.runs.recipes.files import Option, Strict
from modhifi.runs.recipes.prune import Count, Device, ModelSource
from modhifi.runs.timing.runtimes import RUNTIMES


def read_list(texts: Sequence[str]) -> list[str]:
    """The items of texts that separate them by commas."""
    return [item.strip() for text in texts for item in text.split(",")]


class Settings(Strict):
    """What models are timed in; every combination is one setting."""

    panel: ClassVar[str] = "Method"

    runtime: Annotated[
        list[one_of(RUNTIMES)],  # type: ignore[valid-type]
        Field(min_length=1),
        Option(metavar="NAME,...", repeat=True, read=read_list),
    ] = ["eager"]
    """Runtimes: eager, compile, onnx."""
    batch: Annotated[list[Count], Field(min_length=1), Option(metavar="N,...", repeat=True, read=read_list)] = [1]
    """Items in a batch."""
    threads: Annotated[list[Count], Option(metavar="N,...", repeat=True, read=read_list)] = []
    """Threads; by default as many as torch takes."""
    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens in an input of text; by default 1024 (512 on a CPU)."""


class BenchRun(Strict):
    """A bench: the first model, whose loading is that of every model named alike, and the settings."""

    model: ModelSource
    settings: Settings = Settings()
    device: Device = "auto"
