"""The cache directory: tensors that another run can use, each entry with a checksum, all together within a limit.

What is broken, was altered or cannot be read counts as missing, and a disk that is full or cannot be written costs
the entry, not the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.progress import logger

# The cache takes at most this share of what is free on its disk.
SHARE = 0.1
LIMIT = "MODHIFI_CACHE_LIMIT"
DAY = 86400.0
# Entries, and files that become one when they are whole, which carry the number of the process that writes them.
NAMES = re.compile(r"(?:moments/[0-9a-f]{32}|(?:inverted|written)-[0-9a-f]{16})(?:\.safetensors|\.(?P<pid>\d+)\.part)")


def default_directory() -> Path:
    """``$MODHIFI_CACHE``, or ``modhifi`` in the user's cache directory."""
    named = os.environ.get("MODHIFI_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modhifi"


def size_limit() -> int:
    """``$MODHIFI_CACHE_LIMIT``, which is in GiB, or 2 GiB; in bytes. Raises ModhifiError for what is no such number."""
    text = os.environ.get(LIMIT) or "2"
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise ModhifiError(f"{LIMIT}={text} is no size; give a number of GiB")
    return int(limit * 2**30)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """Entries in a directory, ``limit`` bytes of them at most; those used longest ago go first.

    The name of an entry is one of :data:`NAMES`; other files of the directory are neither counted nor removed.
    """

    directory: Path
    limit: int = field(default_factory=size_limit)

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The tensors and facts of an entry; None if there is none, with a warning if it is not what was written."""
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dictionary
            with suppress(OSError):
                os.utime(path)
            if facts.pop("sha256", None) == _checksum(tensors, facts):
                return tensors, facts
        except OSError:
            return None
        except SafetensorError:
            pass
        logger.warning("the cache's entry %s is not what was written; it is made anew", path)
        return None

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bool:
        """Whether an entry is kept, which is whole or not there at all."""
        path = self._path(name)
        part = path.with_suffix(f".{os.getpid()}.part")
        with suppress(OSError, SafetensorError):
            try:
                if self._make_room(path, sum(tensor.nbytes for tensor in tensors.values())):
                    content = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
                    save_file(content, part, metadata={**facts, "sha256": _checksum(content, facts)})
                    os.replace(part, path)
                    return True
            finally:
                part.unlink(missing_ok=True)
        return False

    def entries(self) -> dict[Path, os.stat_result]:
        """Every entry, the one used longest ago first; what killed processes were writing is removed."""
        files = {}
        for path in (*self.directory.glob("*"), *self.directory.glob("moments/*")):
            kind = NAMES.fullmatch(path.relative_to(self.directory).as_posix())
            with suppress(FileNotFoundError):  # another run may remove it meanwhile
                if kind and kind["pid"] and _left_behind(path, int(kind["pid"])):
                    path.unlink()
                elif kind and not kind["pid"]:
                    files[path] = path.stat()
        return dict(sorted(files.items(), key=lambda item: item[1].st_mtime))

    def clear(self) -> None:
        """Removes every entry."""
        for path in self.entries():
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _make_room(self, path: Path, needed: int) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        others = {other: facts.st_size for other, facts in self.entries().items() if other != path}
        used = sum(others.values())
        limit = min(self.limit, (shutil.disk_usage(path.parent).free + used) * SHARE)
        if needed > limit:
            return False
        for other, size in others.items():
            if used + needed <= limit:
                break
            other.unlink(missing_ok=True)
            used -= size
        return True


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    return hashlib.sha256((tensors_hash(tensors) + json.dumps(dict(facts), sort_keys=True)).encode()).hexdigest()


def _left_behind(part: Path, pid: int) -> bool:
    """Whether the process that was writing a file has ended: no process has its number, or the file is a day old."""
    if time.time() - part.stat().st_mtime > DAY:
        return True
    if os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # of another user
    return False
