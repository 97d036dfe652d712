"""The recipe: one run as data. Strict, dumpable to YAML, and enough to repeat the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from modhifi.bounds.verdicts import Tolerances
from modhifi.pruning.budget import Budget
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.layouts import LAYOUTS
from modhifi.pruning.selectors import SELECTORS
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.weightings import WEIGHTINGS
from modhifi.registry import one_of
from modhifi.runs.recipe_file import Strict, validate

Share = Annotated[float, Field(gt=0, lt=1)]


class ModelSource(Strict):
    """What to load."""

    name: str
    args: dict[str, Any] = {}
    pretrained: bool = True
    weights: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False


class DataSource(Strict):
    """Calibration and held-out samples; without ``evaluate`` the held-out ones come from ``source`` too, disjoint.

    None, here and below: what `modhifi.runs.defaults` says for the kind of model.
    """

    source: str = "synthetic"
    samples: Annotated[int, Field(ge=1)] | None = None
    evaluate: str | None = None
    evaluation_samples: Annotated[int, Field(ge=1)] | None = None
    window: Annotated[int, Field(ge=2)] | None = None


class BudgetChoice(Strict):
    """Exactly one of: share of components removed, share of parameters, FLOPs or bytes of the KV cache kept."""

    ratio: float | None = None
    params: str | None = None
    flops: str | None = None
    kv_cache: str | None = None

    def parse(self) -> Budget:
        return Budget.parse(self.ratio, self.params, self.flops, self.kv_cache)


class Method(Strict):
    """How components are chosen and what makes up for them."""

    selector: one_of(SELECTORS) = "obs"  # type: ignore[valid-type]
    compensate: one_of(COMPENSATIONS) = "lstsq"  # type: ignore[valid-type]
    allocate: one_of(WEIGHTINGS) = "amplification"  # type: ignore[valid-type]
    layout: one_of(LAYOUTS) | None = None  # type: ignore[valid-type]
    sequential: Literal["own", "dense"] | None = None
    eta: Annotated[float, Field(gt=0, le=1)] | None = None
    floor: Share = 0.1
    round_to: Annotated[int, Field(ge=1)] = 1
    ridge: Annotated[float, Field(gt=0)] = 1e-4
    rows_per_column: Annotated[int, Field(ge=0)] | None = None
    only: list[str] = []
    exclude: list[str] = []
    coupled: bool = True
    reestimate_batchnorm: bool = False


class Checks(Strict):
    """Tolerances on how far the outputs may move; see :class:`modhifi.bounds.verdicts.Tolerances`.

    ``walked`` samples get the certified rungs; null takes as many as the model's size allows.
    """

    max_flip: Annotated[float, Field(ge=0, le=1)] | None = None
    max_error: Annotated[float, Field(ge=0)] | None = None
    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None
    confidence: Share = 0.95
    not_a_sample: bool = False
    walked: Annotated[int, Field(ge=0)] | None = None

    def tolerances(self) -> Tolerances:
        return Tolerances(self.max_flip, self.max_error, self.confidence, self.not_a_sample, self.max_perplexity_ratio)


class PruneRecipe(Strict):
    """A pruning run. ``plan``, components kept by group, takes the place of a budget."""

    task: Literal["prune"] = "prune"
    model: ModelSource
    data: DataSource = DataSource()
    budget: BudgetChoice = BudgetChoice()
    method: Method = Method()
    checks: Checks = Checks()
    plan: dict[str, list[int]] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=2)] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    offload: bool = False
    out: str | None = None

    def settings(self) -> PruneSettings:
        """What the stages need, of a recipe that `modhifi.runs.defaults.complete` has completed."""
        m = self.method
        assert m.layout is not None and self.batch_size is not None
        return PruneSettings(
            selector=m.selector,
            compensate=m.compensate,
            layout=m.layout,
            weighting=m.allocate,
            sequential=m.sequential,
            floor=m.floor,
            round_to=m.round_to,
            ridge=m.ridge,
            rows_per_column=m.rows_per_column or None,
            eta=m.eta,
            only=tuple(m.only or (["heads"] if self.budget.kv_cache is not None else [])),
            exclude=tuple(m.exclude),
            coupled=m.coupled,
            seed=self.seed,
            batch_size=self.batch_size,
        )


def parse_recipe(data: Any, where: str | Path = "the recipe") -> PruneRecipe:
    """A pruning recipe from a mapping; see :func:`modhifi.runs.recipe_file.validate`."""
    return validate(PruneRecipe, data, where)
