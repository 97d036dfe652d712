"""The stages of a run: how long each took, a line in the log for each, and progress that shows which one is running."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


logger = logging.getLogger("modhifi")
PACKAGES = ("modhifi", "torch", "timm", "transformers")


class Clock:
    """``seconds`` by stage; ``lines`` is the log so far, which also goes to the logger ``modhifi``."""

    def __init__(self, progress: Progress = silent, command: str = "") -> None:
        self.outer = progress
        self.seconds: dict[str, float] = {}
        self.lines: list[str] = []
        versions = [f"{name} {version_of(name)}" for name in PACKAGES]
        self.note(f"python {platform.python_version()}, {', '.join(versions)}, {platform.platform()}")
        if command:
            self.note(command)

    def note(self, text: str) -> None:
        """A line for the log."""
        self.lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        logger.info(text)

    def log(self) -> str:
        """The log so far, as a file's content."""
        return "\n".join(self.lines) + "\n"

    def inner(self, stage: str, done: int, total: int) -> None:
        """Progress inside the running stage."""
        self.outer(f"  {stage}", done, total)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.outer(name, 0, 1)
        start = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self.note(f"{name}: ended by {type(error).__name__} after {time.perf_counter() - start:.1f} s")
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.outer(name, 1, 1)
        self.note(f"{name}: {self.seconds[name]:.1f} s")


def version_of(name: str) -> str:
    """The installed version of a package, in words where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
