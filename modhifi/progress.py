"""The stages of a run: their times, the log, and the progress that shows which one is running."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""A callback that gets the stage, the number of finished steps and their total."""


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


logger = logging.getLogger("modhifi")
LOG = "modhifi.log"
PACKAGES = ("modhifi", "torch", "timm", "transformers")


@contextmanager
def live_log(out: Path | None) -> Iterator[None]:
    """Writes the log of a run to ``OUT.log`` beside ``out`` from its first line on, and removes it at the end.

    The artefact then holds the log; of a run that was killed ``OUT.log`` stays. Nothing is written without ``out``,
    where its directory is not there yet, and where there is a file of that name.
    """
    try:
        place = None if out is None else out.absolute()
        handler = None if place is None else logging.FileHandler(place.with_name(f"{place.name}.log"), "x", "utf-8")
    except (OSError, UnicodeError):  # which the checks of the run tell
        handler = None
    if handler is None:
        yield
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
        Path(handler.baseFilename).unlink(missing_ok=True)


@contextmanager
def muted(name: str) -> Iterator[None]:
    """Keeps the warnings of another package's logger out of the output: what it says is known, or said elsewhere."""
    other = logging.getLogger(name)
    level = other.level
    other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        other.setLevel(level)


class Clock:
    """The times and the log of a run.

    ``seconds`` holds the time of each stage, ``lines`` the log so far, which also goes to the logger ``modhifi``.
    """

    def __init__(self, progress: Progress = silent, command: str = "") -> None:
        self.outer = progress
        self.seconds: dict[str, float] = {}
        self.lines: list[str] = []
        self.written = 0
        versions = [f"{name} {version_of(name)}" for name in PACKAGES]
        self.note(f"python {platform.python_version()}, {', '.join(versions)}, {platform.platform()}")
        if command:
            self.note(command)

    def note(self, text: str) -> None:
        """Adds a line to the log."""
        self.lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        logger.info(text)

    def log(self) -> str:
        """The log so far, as a file's content."""
        self.written = len(self.lines)
        return "\n".join(self.lines) + "\n"

    def write_log(self, directory: Path) -> None:
        """Adds to the log in an artefact's directory what was noted since; a full disk costs only these lines."""
        with suppress(OSError), (directory / LOG).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in self.lines[self.written :])
        self.written = len(self.lines)

    def inner(self, stage: str, done: int, total: int) -> None:
        """Reports progress inside the running stage."""
        self.outer(f"  {stage}", done, total)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block as the stage ``name`` and logs its end, also by an exception."""
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
    """The installed version of a package, or the words ``not installed as a package``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
