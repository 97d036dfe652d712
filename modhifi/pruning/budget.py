"""How much of a model is to stay, and in which measure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modhifi.errors import ModhifiError

if TYPE_CHECKING:  # an impossible budget is refused before torch is imported
    from modhifi.structure.groups import Structure
    from modhifi.structure.sizes import Sizes


@dataclass(frozen=True)
class Budget:
    """``measure`` is ``components``, ``parameters``, ``macs`` or ``cache``; ``keep`` the share of the dense model's."""

    measure: str
    keep: float

    @classmethod
    def parse(
        cls,
        ratio: float | None = None,
        params: str | None = None,
        flops: str | None = None,
        kv_cache: str | None = None,
    ) -> Budget:
        """From the options of the command line; exactly one must be given.

        ``ratio`` is the share of components removed, in (0, 1); the others are shares kept, ``"0.5x"``. Raises
        ModhifiError for none, for several, and for a share outside (0, 1).
        """
        given = [("ratio", ratio), ("params", params), ("flops", flops), ("kv-cache", kv_cache)]
        chosen = [(name, value) for name, value in given if value is not None]
        if len(chosen) != 1:
            raise ModhifiError("give exactly one of --ratio, --params, --flops and --kv-cache, such as --flops 0.5x")
        name, value = chosen[0]
        if name == "ratio":
            share = float(value)
            if not 0 < share < 1:
                raise ModhifiError(f"--ratio is the share of components removed, above 0 and below 1, not {value}")
            return cls("components", 1 - share)
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*x?\s*", str(value))
        if not match or not 0 < float(match.group(1)) < 1:
            raise ModhifiError(f"--{name} is the share of the model kept, above 0x and below 1x, not {value!r}")
        return cls({"params": "parameters", "flops": "macs", "kv-cache": "cache"}[name], float(match.group(1)))

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

    @property
    def label(self) -> str:
        """The measure as a user reads it."""
        return {"macs": "FLOPs", "cache": "KV cache"}.get(self.measure, self.measure)

    def size(self, sizes: Sizes, widths: Mapping[str, int]) -> float:
        """The model's size at some widths, in the budget's measure."""
        measures: dict[str, Callable[[Mapping[str, int]], float]] = {
            "components": sizes.components,
            "parameters": sizes.parameters,
            "macs": sizes.macs,
            "cache": sizes.cache,
        }
        return measures[self.measure](widths)
