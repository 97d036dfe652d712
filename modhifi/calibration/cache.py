"""Moments on disk: a second ratio needs no second pass over the data, an interrupted pass goes on where it was.

A file holds the running sums of one pass (safetensors), under a hash of everything that decides them: weights, code
of the model, samples as the model sees them, settings, versions. Restored sums are those of the pass to the bit, so a
run that was interrupted gives the same result as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from modhifi.calibration.moments import Accumulator
from modhifi.calibration.sampling import LEAST_ROWS, Sampling
from modhifi.data.samples import Samples, digest
from modhifi.disk import make_room
from modhifi.models.loaded import LoadedModel
from modhifi.models.weights import state_hash
from modhifi.progress import version_of

FORMAT = 1
# Writing takes at most this share of the time of a pass.
OVERHEAD = 0.1
PARTS = ("shift", "first", "second")


class MomentCache:
    """The stored moments of one run; ``remark`` says what came from them, empty if nothing did."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "moments"
        self.remark = ""

    def open(
        self, loaded: LoadedModel, readers: Mapping[str, nn.Module], samples: Samples, sampling: Sampling
    ) -> StoredSums:
        """The sums of one pass over ``samples``, as far as an earlier run came with the same ``sampling``."""
        return StoredSums(
            self, self.directory / f"{_key(loaded, readers, samples, sampling)}.safetensors", len(samples)
        )


class StoredSums:
    """The running sums of one pass on disk; ``done`` samples are in them, after ``seconds`` of measuring."""

    def __init__(self, cache: MomentCache, path: Path, total: int) -> None:
        self.cache, self.path, self.total = cache, path, total
        self.done, self.seconds = 0, 0.0
        self._counts: dict[str, int] = {}
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
            self.done, self.seconds = int(facts["done"]), float(facts["seconds"])
            self._counts = json.loads(facts["counts"])
            with suppress(OSError):
                os.utime(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            self.done = 0
        self._began = self._written = time.perf_counter()
        self._cost = 0.0
        self._before = self.seconds

    def restore(self, sums: Mapping[str, Accumulator], readers: Mapping[str, nn.Module]) -> None:
        """Put what was stored into fresh ``sums``."""
        if not self.done:
            return
        with safe_open(self.path, "pt") as file:
            for name, count in self._counts.items():
                device = next(readers[name].parameters()).device
                state = {part: file.get_tensor(f"{name}.{part}").to(device) for part in PARTS}
                sums[name].n = count
                for part, tensor in state.items():
                    setattr(sums[name], part, tensor)
        whole = self.done == self.total
        self.cache.remark = (
            f"moments of {self.done} of {self.total} samples were taken from the cache"
            + (", the rest measured" if not whole else "")
            + f"; {self.seconds:.1f} s saved"
        )

    def keep(self, sums: Mapping[str, Accumulator], done: int) -> None:
        """Write the sums after ``done`` samples, unless that takes too large a share of the time; at the end always.

        A disk that is full or cannot be written costs the cache, not the run.
        """
        now = time.perf_counter()
        if done < self.total and (now - self._written) * OVERHEAD < self._cost:
            return
        tensors = {
            f"{name}.{part}": getattr(s, part).cpu().contiguous() for name, s in sums.items() if s.n for part in PARTS
        }
        facts = {
            "done": str(done),
            "seconds": str(self._before + now - self._began),
            "counts": json.dumps({name: s.n for name, s in sums.items() if s.n}),
        }
        partial = self.path.with_suffix(f".{os.getpid()}.part")
        with suppress(OSError, SafetensorError):
            try:
                if make_room(self.path, sum(t.nbytes for t in tensors.values())):
                    save_file(tensors, partial, metadata=facts)
                    os.replace(partial, self.path)
            finally:
                partial.unlink(missing_ok=True)
        self._written = time.perf_counter()
        self._cost = self._written - now


def _key(loaded: LoadedModel, readers: Mapping[str, nn.Module], samples: Samples, sampling: Sampling) -> str:
    parts = {
        "format": FORMAT,
        "weights": state_hash(loaded.model),
        "code": repr(loaded.model) + str(getattr(loaded.model, "config", "")),
        "readers": sorted(readers),
        "samples": [samples.fingerprint(), len(samples), samples.adapted, digest(samples.load(0))],
        "settings": asdict(sampling),
        "least_rows": LEAST_ROWS,
        "device": next(loaded.model.parameters()).device.type,
        "versions": [metadata.version("torch"), version_of("modhifi")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
