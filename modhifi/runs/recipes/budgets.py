"""The budget of a recipe, in a file that imports no torch: what no model can meet is refused at once."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import ValidationInfo, field_validator

from modhifi.errors import ModhifiError
from modhifi.pruning.budget import Budget
from modhifi.runs.recipes.files import Option, Strict


class BudgetChoice(Strict):
    """The budget: one share, of components removed or of parameters, FLOPs, KV cache, time, memory or experts kept."""

    panel: ClassVar[str] = "Budget"

    ratio: float | None = None
    """Share of components removed, such as 0.5."""
    params: str | None = None
    """Share of parameters kept, such as 0.5x."""
    flops: Annotated[str | None, Option(panel="Most used")] = None
    """Share of FLOPs kept, such as 0.5x."""
    kv_cache: str | None = None
    """Share of the KV cache kept, in whole KV groups, such as 0.5x."""
    latency: str | None = None
    """Share of the measured time of a pass that stays, such as 0.5x, or a time, such as 12ms."""
    memory: str | None = None
    """Share of the memory of a pass that stays, weights and the most that its results hold at once, or 300MB."""
    experts: str | None = None
    """Share of the experts of every mixture kept, such as 0.75x; their neurons are those of the other budgets."""

    @field_validator("ratio", "params", "flops", "kv_cache", "latency", "memory", "experts")
    @classmethod
    def _possible(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            try:
                Budget.parse(**{str(info.field_name): value})
            except ModhifiError as error:
                raise ValueError(str(error).partition(" is ")[2]) from None
        return value

    def parse(self) -> Budget:
        """The budget; raises ModhifiError unless exactly one share is given."""
        return Budget.parse(self.ratio, self.params, self.flops, self.kv_cache, self.latency, self.experts, self.memory)
