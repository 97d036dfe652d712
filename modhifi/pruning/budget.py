"""How much of a model is to stay, and in which measure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from modhifi.errors import ModhifiError

if TYPE_CHECKING:  # an impossible budget is refused before torch is imported
    from modhifi.structure.groups import Structure
    from modhifi.structure.sizes import Sizes
    from modhifi.structure.times import Times

UNITS = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Budget:
    """``measure`` is ``components``, ``parameters``, ``macs``, ``cache``, ``experts`` or ``latency``.

    ``keep`` is the share of the dense model's. A latency may be asked for in ``seconds`` instead; it needs ``times``,
    which :meth:`timed` adds.
    """

    measure: str
    keep: float
    seconds: float | None = None
    times: Times | None = None

    @classmethod
    def parse(
        cls,
        ratio: float | None = None,
        params: str | None = None,
        flops: str | None = None,
        kv_cache: str | None = None,
        latency: str | None = None,
        experts: str | None = None,
    ) -> Budget:
        """From the options of the command line; exactly one must be given.

        ``ratio`` is the share of components removed, in (0, 1); the others are shares kept, ``"0.5x"``, and a
        latency may be a time, ``"12ms"``. Raises ModhifiError for none, for several, and for a share outside (0, 1).
        """
        given = [("ratio", ratio), ("params", params), ("flops", flops), ("kv-cache", kv_cache), ("latency", latency)]
        given.append(("experts", experts))
        chosen = [(name, value) for name, value in given if value is not None]
        if len(chosen) != 1:
            raise ModhifiError(
                "give exactly one of --ratio, --params, --flops, --kv-cache, --latency and --experts, such as --flops "
                "0.5x"
            )
        name, value = chosen[0]
        if name == "ratio":
            share = float(value)
            if not 0 < share < 1:
                raise ModhifiError(f"--ratio is the share of components removed, above 0 and below 1, not {value}")
            return cls("components", 1 - share)
        time = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s)\s*", str(value)) if name == "latency" else None
        if time is not None and float(time.group(1)) > 0:
            return cls("latency", 1.0, float(time.group(1)) * UNITS[time.group(2)])
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

    def timed(self, times: Times) -> Budget:
        """The budget of a latency with the times that it speaks of; raises ModhifiError for one that is met already."""
        if self.seconds is None:
            return replace(self, times=times)
        dense = times.seconds({})
        if self.seconds >= dense:
            raise ModhifiError(
                f"the model takes {1e3 * dense:.3g} ms here already, not more than {1e3 * self.seconds:.3g} ms; "
                "ask for less"
            )
        return replace(self, keep=self.seconds / dense, times=times)

    def ordered(self, removed: Mapping[str, Sequence[int]]) -> Budget:
        """The budget for blocks and sublayers that go in this order; see `structure.sizes.Depth.ordered`."""
        return self if self.times is None else replace(self, times=self.times.ordered(removed))

    @property
    def label(self) -> str:
        """The measure as a user reads it."""
        return {"macs": "FLOPs", "cache": "KV cache", "latency": "time"}.get(self.measure, self.measure)

    def size(self, sizes: Sizes, widths: Mapping[str, int]) -> float:
        """The model's size at some widths, in the budget's measure."""
        if self.times is not None:
            return self.times.seconds(widths)
        measures: dict[str, Callable[[Mapping[str, int]], float]] = {
            "components": sizes.components,
            "parameters": sizes.parameters,
            "macs": sizes.macs,
            "cache": sizes.cache,
        }
        return measures[self.measure](widths)

    def touching(self, sizes: Sizes) -> dict[str, Callable[[Mapping[str, int]], float]]:
        """For each group the size of what its width changes; empty where one group is like another."""
        if self.times is not None:
            return {name: own.seconds for name, own in self.times.touching().items()}
        if self.measure not in ("parameters", "macs"):
            return {}
        return {name: partial(self.size, own) for name, own in sizes.touching().items()}
