"""Moments on disk: a second ratio needs no second pass over the data, an interrupted pass goes on where it was.

An entry holds the running sums of one pass, under a hash of everything that decides them: the model, what it computes,
samples as it sees them, settings, versions. Restored sums are those of the pass to the bit, so a run that was
interrupted gives the same result as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import nn

from modhifi.cache import Cache
from modhifi.calibration.accumulator import Accumulator
from modhifi.calibration.sampling import LEAST_ROWS, Sampling
from modhifi.data.samples import Samples, digest
from modhifi.models.fingerprint import fingerprint
from modhifi.models.loaded import LoadedModel

FORMAT = 4
# Writing takes at most this share of the time of a pass.
OVERHEAD = 0.1
PARTS = ("shift", "first", "second", "held", "expected")


class MomentCache:
    """The stored moments of one run; ``remarks`` say what came from them, pass by pass, and what was not kept."""

    def __init__(self, directory: Path) -> None:
        self.entries = Cache(directory)
        self.remarks: list[str] = []

    @property
    def remark(self) -> str:
        """The remarks in one line, empty if there is none."""
        return "; ".join(self.remarks)

    def open(
        self, loaded: LoadedModel, readers: Mapping[str, nn.Module], samples: Samples, sampling: Sampling
    ) -> StoredSums:
        """The sums of one pass over ``samples``, as far as an earlier run came with the same ``sampling``."""
        return StoredSums(self, f"moments/{_key(loaded, readers, samples, sampling)}", len(samples))


class StoredSums:
    """The running sums of one pass on disk; ``done`` samples are in them, after ``seconds`` of measuring."""

    def __init__(self, cache: MomentCache, name: str, total: int) -> None:
        self.cache, self.name, self.total = cache, name, total
        self._tensors, facts = cache.entries.read(name) or ({}, {})
        self.done, self.seconds = int(facts.get("done", 0)), float(facts.get("seconds", 0))
        self._counts: dict[str, int] = json.loads(facts.get("counts", "{}"))
        self._began = self._written = time.perf_counter()
        self._cost = 0.0
        self._before = self.seconds

    def restore(self, sums: Mapping[str, Accumulator], readers: Mapping[str, nn.Module]) -> None:
        """Put what was stored into fresh ``sums``, once."""
        if not self.done:
            return
        for name, count in self._counts.items():
            device = next(readers[name].parameters()).device
            own = {part: tensor for part in PARTS if (tensor := self._tensors.pop(f"{name}.{part}", None)) is not None}
            sums[name].restore(count, {part: tensor.to(device) for part, tensor in own.items()})
        whole = self.done == self.total
        self.cache.remarks.append(
            f"moments of {self.done} of {self.total} samples were taken from the cache"
            + (", the rest measured" if not whole else "")
            + f"; {self.seconds:.1f} s saved"
        )

    def keep(self, sums: Mapping[str, Accumulator], done: int) -> None:
        """Write the sums after ``done`` samples, unless that takes too large a share of the time; at the end always."""
        now = time.perf_counter()
        if done < self.total and (now - self._written) * OVERHEAD < self._cost:
            return
        tensors = {f"{name}.{part}": tensor for name, s in sums.items() for part, tensor in s.state().items()}
        facts = {
            "done": str(done),
            "seconds": str(self._before + now - self._began),
            "counts": json.dumps({name: s.n for name, s in sums.items() if s.n}),
        }
        if not self.cache.entries.write(self.name, tensors, facts) and done == self.total:
            size = sum(tensor.nbytes for tensor in tensors.values())
            self.cache.remarks.append(
                f"moments of {size / 1e9:.3g} GB were not kept: the cache's limit or its disk is too small"
            )
        self._written = time.perf_counter()
        self._cost = self._written - now


def _key(loaded: LoadedModel, readers: Mapping[str, nn.Module], samples: Samples, sampling: Sampling) -> str:
    parts = {
        "format": FORMAT,
        "model": fingerprint(loaded, readers),
        "readers": sorted(readers),
        "samples": [samples.fingerprint(), len(samples), samples.adapted, digest(samples.load(0))],
        "settings": asdict(sampling),
        "least_rows": LEAST_ROWS,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
