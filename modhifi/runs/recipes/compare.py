"""What `modhifi compare` tries: selectors, compensations and budgets, and what all cells have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from modhifi.errors import ModhifiError
from modhifi.pruning.budget import Budget
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.selectors import SELECTORS
from modhifi.registry import one_of
from modhifi.runs.recipes.files import Option, Strict
from modhifi.runs.recipes.prune import DataSource, Device, Method, ModelSource, Out, PruneRecipe, Seed

DEFAULT_FLOPS = ("0.7x", "0.5x", "0.3x")
# The keys of a method that differ from cell to cell, or take the place of a budget, or change the model afterwards.
NOT_SHARED = ("selector", "compensate", "eta", "reestimate_batchnorm")


def read_words(items: Sequence[str]) -> list[str]:
    """The words of texts that separate them by commas."""
    return [word.strip() for item in items for word in item.split(",") if word.strip()]


def words(metavar: str, panel: str) -> Option:
    """An option that takes several values, separated by commas or repeated."""
    return Option(panel=panel, metavar=metavar, read=read_words)


class CompareRecipe(Strict):
    """A grid of pruning runs on one model, one set of moments and one set of held-out samples."""

    model: ModelSource
    selectors: Annotated[
        list[one_of(SELECTORS)],  # type: ignore[valid-type]
        Field(min_length=1),
        words("A,B", "Most used"),
    ] = ["obs", "magnitude", "naive"]
    """How components are chosen; several with commas, or repeated."""
    compensate: Annotated[
        list[one_of(COMPENSATIONS)],  # type: ignore[valid-type]
        Field(min_length=1),
        words("A,B", "Most used"),
    ] = ["lstsq", "delta", "none"]
    """What makes up for the removed ones; several with commas, or repeated."""
    flops: Annotated[list[str], words("0.7x,0.5x", "Most used")] = []
    """Shares of FLOPs kept; 0.7x,0.5x,0.3x where no budget is given."""
    params: Annotated[list[str], words("0.7x,0.5x", "Budget")] = []
    """Shares of parameters kept."""
    ratio: Annotated[list[float], words("0.3,0.5", "Budget")] = []
    """Shares of components removed."""
    data: DataSource = DataSource()
    method: Method = Method()
    seed: Seed = 0
    batch_size: Annotated[int, Field(ge=2)] | None = None
    """Items run at once; by default 32 images or 4 windows."""
    device: Device = "auto"
    out: Out = None

    @field_validator("flops", "params", "ratio")
    @classmethod
    def _possible(cls, values: list[Any], info: ValidationInfo) -> list[Any]:
        for value in values:
            try:
                Budget.parse(**{str(info.field_name): value})
            except ModhifiError as error:
                raise ValueError(str(error).partition(" is ")[2]) from None
        return values

    @field_validator("method")
    @classmethod
    def _shared(cls, method: Method) -> Method:
        for key in NOT_SHARED:
            if getattr(method, key) != Method.model_fields[key].default:
                raise ValueError(f"{key} is not what all cells share; leave it out, or give selectors and compensate")
        return method

    def budgets(self) -> dict[str, Budget]:
        """The budgets by name, in the order in which they are given."""
        flops = self.flops or (() if self.params or self.ratio else DEFAULT_FLOPS)
        return {
            **{f"{share} FLOPs": Budget.parse(flops=share) for share in flops},
            **{f"{share} parameters": Budget.parse(params=share) for share in self.params},
            **{f"{share:g} removed": Budget.parse(ratio=share) for share in self.ratio},
        }

    def cell(self, selector: str, compensate: str) -> PruneRecipe:
        """The pruning run of a cell, without its budget."""
        method = self.method.model_copy(update={"selector": selector, "compensate": compensate})
        return PruneRecipe(model=self.model, data=self.data, method=method, seed=self.seed, batch_size=self.batch_size)
