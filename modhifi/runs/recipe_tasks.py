"""Recipes of every task, and of several steps: what `modhifi recipe` validates and runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from modhifi.errors import ModhifiError
from modhifi.runs.recipe import Checks, ModelSource, PruneRecipe
from modhifi.runs.recipe_file import Strict, validate
from modhifi.runs.unlearn_recipe import UnlearnRecipe

STEP = "step:"
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


class HeldOut(Strict):
    """Data that calibrated nothing."""

    source: str
    samples: Annotated[int, Field(ge=1)] = 1000
    allow_overlap: bool = False


class VerifyRecipe(Strict):
    """The ladder of bounds on an artefact; ``against`` is the model that its manifest names unless said."""

    task: Literal["verify"] = "verify"
    directory: str
    against: ModelSource | None = None
    data: HeldOut
    checks: Checks = Checks()
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=1)] = 32
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: str | None = None


class AuditData(Strict):
    """Images that the edit did not see, split for re-estimated norms, for attacks to learn from and for the test.

    With ``evaluate`` only those are for the attacks and the test, and ``source`` may be what the edit saw.
    """

    source: str
    samples: Annotated[int, Field(ge=1)] = 2000
    evaluate: str | None = None
    forget: str | None = None
    members: str | None = None


class AuditChecks(Strict):
    """What must hold of a model that forgot: its verdict is this one or a better one; the others lose no more."""

    at_least: Literal["SUPPRESSED", "PARTLY ERASED", "ERASED FOR A LINEAR READER"] | None = None
    max_retain_loss: Annotated[float, Field(ge=0, le=1)] | None = None


class AuditRecipe(Strict):
    """Attacks on a model that was made to forget."""

    task: Literal["audit"] = "audit"
    directory: str
    data: AuditData
    forget: list[str] = []
    original: str | None = None
    reference: str | None = None
    checks: AuditChecks = AuditChecks()
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=2)] = 64
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: str | None = None


Step = Annotated[PruneRecipe | UnlearnRecipe | VerifyRecipe | AuditRecipe, Field(discriminator="task")]
TASKS: dict[str, type[PruneRecipe] | type[UnlearnRecipe] | type[VerifyRecipe] | type[AuditRecipe]] = {
    "prune": PruneRecipe,
    "unlearn": UnlearnRecipe,
    "verify": VerifyRecipe,
    "audit": AuditRecipe,
}


class StepsRecipe(Strict):
    """Several steps, run in order; each writes to OUT/NAME, and a later one says ``step:NAME`` for that directory.

    ``sweep`` maps one path of the recipe (``steps.NAME.budget.flops``) to values, from the one most wanted to the
    least: all steps run with each, and the first value with which nothing fails is kept.
    """

    steps: Annotated[dict[str, Step], Field(min_length=1)]
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    out: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StepsRecipe:
        earlier: list[str] = []
        for name, step in self.steps.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"the step name {name!r} is no plain word (a-z, 0-9, -)")
            if step.out is not None:
                raise ValueError(f"step {name}: its output goes to OUT/{name}; remove its out")
            for used in references(step.model_dump(mode="json")):
                if used not in earlier:
                    raise ValueError(f"step {name}: {STEP}{used} is no step before it")
            earlier.append(name)
        if len(self.sweep) > 1:
            raise ValueError("a sweep goes over one key")
        return self


Recipe = PruneRecipe | UnlearnRecipe | VerifyRecipe | AuditRecipe | StepsRecipe


def parse(content: dict[str, Any], where: str | Path = "the recipe") -> Recipe:
    """A recipe of any task. Raises ModhifiError, one line, that names the key (see `recipe_file.validate`)."""
    if "steps" in content:
        return validate(StepsRecipe, content, where)
    task = content.get("task", "prune")
    if task not in TASKS:
        raise ModhifiError(f"{where}: there is no task {task!r}; it is one of {', '.join(TASKS)}, or the key is steps")
    return validate(TASKS[task], content, where)


def references(content: Any) -> Iterator[str]:
    """The names of the steps that a recipe's content refers to."""
    if isinstance(content, str) and content.startswith(STEP):
        yield content.removeprefix(STEP)
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from references(value)


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    content = TypeAdapter(Recipe).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "modhifi recipe", **content}
