"""Directories that appear whole or not at all: filled beside their place, and exchanged into it in one step.

Where the system offers it (Linux), the new directory and the old one change places in a single call, so that a
reader, a crash or ``kill -9`` finds one of the two, whole. Elsewhere the old one is renamed for a moment, and after a
crash the next run restores it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from modhifi.errors import ModhifiError

if os.name == "posix":
    import fcntl

# Flags of renameat2(2); AT_FDCWD means the current directory.
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# The signals that wait until the directories have changed places.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yields a directory to fill, which replaces ``out`` if the block succeeds and is removed if it raises.

    The old content of ``out`` is lost: call :func:`modhifi.disk.check_output` before. A directory that
    :func:`stays` has its entries replaced, with the old ones restored on any exception.
    Raises ModhifiError where the disk is full or cannot be written.
    """
    inside = stays(out)
    place = out if inside else out.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        recover(out)
        with _workplace(place, out.name) as folder:
            fresh = folder / "new"
            fresh.mkdir()
            yield fresh
            with _signals_held():
                if inside:
                    _change_entries(fresh, out, folder)
                elif os.path.lexists(out):
                    exchange(fresh, out, folder / "old")
                else:
                    os.rename(fresh, out)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModhifiError(f"cannot write {out}: {reason}; check space and permissions") from error


def stays(out: Path) -> bool:
    """Whether ``out`` exists and cannot be replaced as a whole.

    So it is with a mount point, in a parent that is not ours, and where it holds the working directory.
    """
    return os.path.isdir(out) and (
        os.path.ismount(out) or not os.access(out.parent, os.W_OK | os.X_OK) or _holds_working_directory(out)
    )


def _holds_working_directory(out: Path) -> bool:
    with suppress(OSError):  # it is gone
        return Path.cwd().is_relative_to(out.resolve())
    return False


def exchange(fresh: Path, out: Path, aside: Path) -> None:
    """Moves ``fresh`` to the place of ``out``; the old directory moves to ``aside``, or to the place of ``fresh``.

    That is one system call on Linux, elsewhere two renames, of which the first is undone where the second fails.
    """
    if _exchanged(fresh, out):
        return
    backup = out.with_name(f".{_short(out.name)}.replaced")
    os.rename(out, backup)
    try:
        os.rename(fresh, out)
    except BaseException:
        os.rename(backup, out)
        raise
    os.rename(backup, aside)


def recover(out: Path) -> None:
    """Restores ``out`` where a run was killed between the two renames of :func:`exchange` or inside a mount point."""
    if not out.name:
        return  # the root
    backup = out.with_name(f".{_short(out.name)}.replaced")
    if backup.is_dir():
        if os.path.lexists(out):
            shutil.rmtree(backup)  # killed behind the second rename
        else:
            os.rename(backup, out)
    if os.path.isdir(out):
        for folder in out.glob(".modhifi-*"):
            if (folder / "old").is_dir() and not _in_use(folder):
                _put_back(folder / "old", out, new=_names(folder / "entries"))
                shutil.rmtree(folder)


def _exchanged(first: Path, second: Path) -> bool:
    """Exchanges two directories in one system call; False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _change_entries(fresh: Path, out: Path, folder: Path) -> None:
    """Replaces the entries of ``out``, which stays, by those of ``fresh``; ``folder`` is inside ``out``."""
    old = folder / "old"
    old.mkdir()
    try:
        for path in out.iterdir():
            if path not in (folder, out / "lost+found"):
                os.rename(path, old / path.name)
        # Not before: until here an entry of the same name is an old one.
        (folder / "entries").write_text("\0".join(sorted(p.name for p in fresh.iterdir())), encoding="utf-8")
        for path in list(fresh.iterdir()):
            os.rename(path, out / path.name)
    except BaseException:
        _put_back(old, out, new=_names(folder / "entries"))
        raise
    # From here on a killed run leaves the new entries: without this directory nothing is put back.
    os.rename(old, folder / "replaced")


def _put_back(old: Path, out: Path, new: list[str]) -> None:
    """Restores the old entries of a directory and removes the new ones that have arrived already."""
    for name in new:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in list(old.iterdir()):
        os.rename(path, out / path.name)


def _names(file: Path) -> list[str]:
    """The names of the entries that a killed run was about to move in; none where it was killed before."""
    with suppress(OSError):
        return [name for name in file.read_text(encoding="utf-8").split("\0") if name]
    return []


@contextmanager
def _workplace(place: Path, name: str) -> Iterator[Path]:
    """Yields a directory of this process beside (or inside) the output; those of dead processes are removed first."""
    for leftover in place.glob(".modhifi-*"):
        if leftover.is_dir() and not _in_use(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    with _signals_held():
        folder = Path(tempfile.mkdtemp(prefix=f".modhifi-{_short(name)}-", dir=place))
        lock = _lock(folder)
    try:
        yield folder
    finally:
        with _signals_held():
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Locks a directory until this process ends; None where another process holds the lock or locks do not exist."""
    if os.name != "posix":
        return None
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(number)
        return None
    return number


def _in_use(folder: Path) -> bool:
    """Whether the process that made a workplace may be alive."""
    lock = _lock(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


def _short(name: str) -> str:
    """The first 100 bytes of a name, which leave room for a prefix and a suffix: file systems take 255."""
    return os.fsdecode(os.fsencode(name)[:100])


@contextmanager
def _signals_held() -> Iterator[None]:
    """Defers the signals that end a run until the block is done; only the main thread receives any.

    Handlers are exchanged, not masked: a signal that one thread masks is delivered to another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        for number in arrived:
            os.kill(os.getpid(), number)
