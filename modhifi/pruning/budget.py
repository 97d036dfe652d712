"""How much of a model is to stay, and in which measure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from modhifi.errors import ModhifiError

if TYPE_CHECKING:  # an impossible budget is refused before torch is imported
    from modhifi.structure.gauge import Gauge
    from modhifi.structure.groups import Structure
    from modhifi.structure.sizes import Sizes

# The units in which a latency or a memory may be asked for, in seconds and bytes.
UNITS = {
    "latency": {"ms": 1e-3, "s": 1.0},
    "memory": {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
}


@dataclass(frozen=True)
class Budget:
    """``measure`` is ``components``, ``parameters``, ``macs``, ``cache``, ``experts``, ``latency`` or ``memory``.

    ``keep`` is the share of the dense model's. A latency or a memory may be asked for as an ``absolute`` amount
    instead, in seconds or bytes; both need a ``gauge``, which :meth:`gauged` adds.
    """

    measure: str
    keep: float
    absolute: float | None = None
    gauge: Gauge | None = None

    @classmethod
    def parse(
        cls,
        ratio: float | None = None,
        params: str | None = None,
        flops: str | None = None,
        kv_cache: str | None = None,
        latency: str | None = None,
        experts: str | None = None,
        memory: str | None = None,
    ) -> Budget:
        """From the options of the command line; exactly one must be given.

        ``ratio`` is the share of components removed, in (0, 1); the others are shares kept, ``"0.5x"``; a latency may
        be a time, ``"12ms"``, and a memory an amount, ``"300MB"``.
        Raises ModhifiError for none, for several, and for a share outside (0, 1).
        """
        given = [("ratio", ratio), ("params", params), ("flops", flops), ("kv-cache", kv_cache), ("latency", latency)]
        given += [("experts", experts), ("memory", memory)]
        chosen = [(name, value) for name, value in given if value is not None]
        if len(chosen) != 1:
            raise ModhifiError(
                "give exactly one of --ratio, --params, --flops, --kv-cache, --latency, --memory and --experts, such "
                "as --flops 0.5x"
            )
        name, value = chosen[0]
        if name == "ratio":
            share = float(value)
            if not 0 < share < 1:
                raise ModhifiError(f"--ratio is the share of components removed, above 0 and below 1, not {value}")
            return cls("components", 1 - share)
        units = UNITS.get(name, {})
        amount = re.fullmatch(rf"\s*([0-9]*\.?[0-9]+)\s*({'|'.join(units)})\s*", str(value)) if units else None
        if amount is not None and float(amount.group(1)) > 0:
            return cls(name, 1.0, float(amount.group(1)) * units[amount.group(2)])
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*x?\s*", str(value))
        if not match or not 0 < float(match.group(1)) < 1:
            raise ModhifiError(f"--{name} is the share of the model kept, above 0x and below 1x, not {value!r}")
        return cls(
            {"params": "parameters", "flops": "macs", "kv-cache": "cache"}.get(name, name),
            float(match.group(1)),
        )

    def fit(self, kind: str) -> None:
        """Raises ModhifiError where a model of this kind (as in `LoadedModel.kind`) has nothing of the measure."""
        if self.measure == "cache" and kind != "text":
            raise ModhifiError("only a causal language model keeps a KV cache; give --ratio, --params or --flops")

    def require(self, structure: Structure) -> None:
        """Raises ModhifiError where FLOPs are asked for and a kernel of the model does an unknown number of them."""
        if self.measure == "macs" and structure.uncounted:
            raise ModhifiError(
                f"the FLOPs of this model cannot be counted: no formula tells the work of "
                f"{', '.join(structure.uncounted)}; give --ratio or --params"
            )

    def gauged(self, gauge: Gauge) -> Budget:
        """The budget of a latency or a memory with what tells it; raises ModhifiError for one that is met already."""
        if self.absolute is None:
            return replace(self, gauge=gauge)
        dense = gauge.amount({})
        if self.absolute >= dense:
            raise ModhifiError(
                f"the model takes {self.told(dense)} here already, not more than {self.told(self.absolute)}; "
                "ask for less"
            )
        return replace(self, keep=self.absolute / dense, gauge=gauge)

    def told(self, amount: float) -> str:
        """A latency or a memory with its unit."""
        return f"{1e3 * amount:.3g} ms" if self.measure == "latency" else f"{amount / 1e6:.4g} MB"

    def ordered(self, removed: Mapping[str, Sequence[int]]) -> Budget:
        """The budget for blocks and sublayers that go in this order; see `structure.sizes.Depth.ordered`."""
        return self if self.gauge is None else replace(self, gauge=self.gauge.ordered(removed))

    def option(self, keep: float) -> str:
        """The option that asks for a share of the same measure to be kept, rounded up to a thousandth."""
        if self.measure == "components":
            return f"--ratio {math.floor(1e3 * (1 - keep)) / 1e3:g}"
        name = {"parameters": "params", "macs": "flops", "cache": "kv-cache"}.get(self.measure, self.measure)
        return f"--{name} {math.ceil(1e3 * keep) / 1e3:g}x"

    @property
    def label(self) -> str:
        """The measure as a user reads it."""
        return {"macs": "FLOPs", "cache": "KV cache", "latency": "time"}.get(self.measure, self.measure)

    def size(self, sizes: Sizes, widths: Mapping[str, int]) -> float:
        """The model's size at some widths, in the budget's measure."""
        if self.gauge is not None:
            return self.gauge.amount(widths)
        measures: dict[str, Callable[[Mapping[str, int]], float]] = {
            "components": sizes.components,
            "parameters": sizes.parameters,
            "macs": sizes.macs,
            "cache": sizes.cache,
        }
        return measures[self.measure](widths)

    def touching(self, sizes: Sizes) -> dict[str, Callable[[Mapping[str, int]], float]]:
        """For each group the size of what its width changes; empty where one group is like another."""
        if self.gauge is not None:
            return {name: own.amount for name, own in self.gauge.touching().items()}
        if self.measure not in ("parameters", "macs"):
            return {}
        return {name: partial(self.size, own) for name, own in sizes.touching().items()}
