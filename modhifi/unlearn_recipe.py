"""The recipe of an unlearning run."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from .errors import ModhifiError
from .recipe import Checks, ModelSource, Strict, read_yaml
from .unlearn import Method, UnlearnSettings


class UnlearnData(Strict):
    """Where the samples come from; see :func:`modhifi.unlearn_data.load_unlearn_data`."""

    source: str
    samples: Annotated[int, Field(ge=1)] = 2000
    forget: str | None = None
    evaluate: str | None = None
    evaluation_samples: Annotated[int, Field(ge=1)] = 2000
    members: str | None = None


class UnlearnMethod(Strict):
    """How to forget; null takes the method's own default."""

    name: Method = "erase-writers"
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


def parse_unlearn_recipe(data: Any, where: str = "the recipe") -> UnlearnRecipe:
    """Validate a mapping. Raises ModhifiError that names the key, and the nearest known one for an unknown key."""
    try:
        return UnlearnRecipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            models: tuple[type[BaseModel], ...] = (UnlearnRecipe, ModelSource, UnlearnData, UnlearnMethod, Checks)
            keys = [key for model in models for key in model.model_fields]
            near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "; remove it"
            raise ModhifiError(f"{where}: unknown key '{path}'{hint}") from None
        raise ModhifiError(f"{where}: {path or 'recipe'}: {first['msg'].lower()}, not {first['input']!r}") from None


def load_unlearn_recipe(path: Path) -> UnlearnRecipe:
    """Read a YAML recipe. Raises ModhifiError for a missing file, bad YAML and bad content."""
    return parse_unlearn_recipe(read_yaml(path), str(path))
