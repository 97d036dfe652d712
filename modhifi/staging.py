"""Directories that appear whole or not at all: filled beside their place, and exchanged into it in one step.

Where the system offers it (Linux), the new directory and the old one change places in a single call, so that a
reader, a crash or ``kill -9`` meets one of the two, whole. Elsewhere the old one is renamed for a moment, and whoever
comes next puts it back.
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

# Of the flags of renameat2(2); AT_FDCWD is what stands for the current directory.
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# What arrives meanwhile waits until the directories have changed places.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of ``out`` if the block ends well and vanishes if it does not.

    What ``out`` held is gone afterwards: ask :func:`modhifi.disk.check_output` before. A mount point, and a directory
    whose parent cannot be written, stays itself and changes its entries, with the old ones put back on any exception.
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
    """Whether ``out`` exists and cannot be replaced as a whole: a mount point, or in a parent that is not ours."""
    return os.path.isdir(out) and (os.path.ismount(out) or not os.access(out.parent, os.W_OK | os.X_OK))


def exchange(fresh: Path, out: Path, aside: Path) -> None:
    """Put ``fresh`` where ``out`` is; what was there goes to ``aside``, or to where ``fresh`` was.

    One system call on Linux. Elsewhere two renames, of which the first is undone where the second fails.
    """
    if _exchanged(fresh, out):
        return
    kept = out.with_name(f".{_short(out.name)}.replaced")
    os.rename(out, kept)
    try:
        os.rename(fresh, out)
    except BaseException:
        os.rename(kept, out)
        raise
    os.rename(kept, aside)


def recover(out: Path) -> None:
    """Bring ``out`` back where a run was killed between the two renames of :func:`exchange`, and in a mount point."""
    if not out.name:
        return  # the root
    kept = out.with_name(f".{_short(out.name)}.replaced")
    if kept.is_dir():
        if os.path.lexists(out):
            shutil.rmtree(kept)  # killed behind the second rename
        else:
            os.rename(kept, out)
    if os.path.isdir(out):
        for folder in out.glob(".modhifi-*"):
            if (folder / "old").is_dir() and not _in_use(folder):
                _put_back(folder / "old", out, new=_names(folder / "entries"))
                shutil.rmtree(folder)


def _exchanged(first: Path, second: Path) -> bool:
    """Whether the system let two directories change places; False where it or the file system cannot."""
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
    """The entries of ``fresh`` in place of those of ``out``, which stays; ``folder`` is inside it."""
    old = folder / "old"
    (folder / "entries").write_text("\0".join(sorted(p.name for p in fresh.iterdir())), encoding="utf-8")
    old.mkdir()
    try:
        for path in out.iterdir():
            if path not in (folder, out / "lost+found"):
                os.rename(path, old / path.name)
        for path in list(fresh.iterdir()):
            os.rename(path, out / path.name)
    except BaseException:
        _put_back(old, out, new=_names(folder / "entries"))
        raise
    # From here on a killed run leaves the new entries: without this directory nothing is put back.
    os.rename(old, folder / "replaced")


def _put_back(old: Path, out: Path, new: list[str]) -> None:
    """The old entries of a directory, in place of those new ones that have come already."""
    for name in new:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in list(old.iterdir()):
        os.rename(path, out / path.name)


def _names(file: Path) -> list[str]:
    """The entries that a killed run was about to bring; none where it had not come so far."""
    with suppress(OSError):
        return [name for name in file.read_text(encoding="utf-8").split("\0") if name]
    return []


@contextmanager
def _workplace(place: Path, name: str) -> Iterator[Path]:
    """A directory of this process beside (or inside) the output, gone at the end; those of dead processes go first."""
    for left in place.glob(".modhifi-*"):
        if left.is_dir() and not _in_use(left):
            shutil.rmtree(left, ignore_errors=True)
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
    """A lock on a directory, which ends with this process; None where another process has it, or none can be had."""
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
    """A name that leaves room for what is put around it: file systems take 255 bytes."""
    return os.fsdecode(os.fsencode(name)[:100])


@contextmanager
def _signals_held() -> Iterator[None]:
    """Inside, the signals that end a run wait; only the main thread gets any."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
