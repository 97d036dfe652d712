"""The recipe of an unlearning run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from modhifi.registry import one_of
from modhifi.runs.recipe import Checks, ModelSource
from modhifi.runs.recipe_file import Strict, validate
from modhifi.unlearning.methods import METHODS
from modhifi.unlearning.settings import UnlearnSettings


class UnlearnData(Strict):
    """Where the samples come from; see :func:`modhifi.unlearning.data.load_unlearn_data`."""

    source: str
    samples: Annotated[int, Field(ge=1)] = 2000
    forget: str | None = None
    evaluate: str | None = None
    evaluation_samples: Annotated[int, Field(ge=1)] = 2000
    members: str | None = None


class UnlearnMethod(Strict):
    """How to forget; null takes the method's own default."""

    name: one_of(METHODS) = "erase-writers"  # type: ignore[valid-type]
    depth: Annotated[int, Field(ge=1)] | None = None
    passes: Annotated[int, Field(ge=1)] | None = None
    strength: Annotated[float, Field(gt=0)] | None = None
    retain_budget: Annotated[float, Field(ge=0, le=1)] | None = None
    only: list[str] = []
    exact: bool = True
    forget_weight: Annotated[float, Field(gt=0, lt=1)] = 0.1
    damping: Annotated[float, Field(gt=0)] = 1e-3
    settle: bool = True


class UnlearnRecipe(Strict):
    """An unlearning run."""

    task: Literal["unlearn"] = "unlearn"
    model: ModelSource
    forget: Annotated[list[str], Field(min_length=1)]
    data: UnlearnData
    method: UnlearnMethod = UnlearnMethod()
    checks: Checks = Checks()
    reference: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=2)] = 64
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: str | None = None

    def settings(self) -> UnlearnSettings:
        m = self.method
        return UnlearnSettings(
            method=m.name,
            depth=m.depth,
            passes=m.passes,
            strength=m.strength,
            only=tuple(m.only),
            exact=m.exact,
            forget_weight=m.forget_weight,
            damping=m.damping,
            settle=m.settle,
            batch_size=self.batch_size,
        )


def parse_unlearn_recipe(data: Any, where: str | Path = "the recipe") -> UnlearnRecipe:
    """An unlearning recipe from a mapping; see :func:`modhifi.runs.recipe_file.validate`."""
    return validate(UnlearnRecipe, data, where)
