"""The recipes of every task, and of several steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, model_validator

from modhifi.errors import ModhifiError
from modhifi.runs.recipes.files import Option, Strict, validate
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.recipes.prune import Checks, Count, Device, ModelSource, Out, PruneRecipe, ReportOut, Seed, Summary
from modhifi.runs.recipes.unlearn import UnlearnRecipe

STEP = "step:"
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


class HeldOut(Strict):
    """The source of samples that calibrated nothing. None is the default of `modhifi.runs.defaults`."""

    panel: ClassVar[str] = "Data"

    source: Annotated[str, Option("--data")]
    """Held-out data: images:DIR, text:FILE, hf:DATASET[:SPLIT] or synthetic."""
    samples: Count | None = None
    """Held-out samples; by default 1000 images, 32 windows (16 on a CPU)."""
    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens in a window of text; by default 1024 (512 on a CPU)."""
    allow_overlap: bool = False
    """Also take samples that calibrated the model; bounds then mean less."""


class VerifyRecipe(Strict):
    """A verification: the ladder of bounds on an artefact."""

    task: Literal["verify"] = "verify"
    directory: Annotated[str, Option("DIR")]
    """An artefact of prune or unlearn."""
    against: Annotated[ModelSource | None, Option("--against", metavar="MODEL")] = None
    """The original it was made from; by default the one that its manifest names."""
    data: HeldOut
    checks: Checks = Checks()
    seed: Seed = 0
    batch_size: Count | None = None
    """Items run at once; by default 32 images or 4 windows."""
    device: Device = "auto"
    out: ReportOut = None
    summary: Summary = None


class AuditData(Strict):
    """Images that the edit did not see, split for re-estimated norms, for attacks to learn from and for the test."""

    panel: ClassVar[str] = "Data"

    source: Annotated[str, Option("--data")]
    """Images that the edit did not see: images:DIR or hf:DATASET; with --evaluate they may be those it saw."""
    samples: Count = 2000
    """Number of images, half for attacks to learn."""
    evaluate: str | None = None
    """Images for attacks and test alone; by default a part of --data."""
    forget: Annotated[str | None, Option("--forget-data")] = None
    """Samples of the forgotten classes; by default those in --data."""
    members: str | None = None
    """Training images of the forgotten classes, for the membership attack."""


class AuditChecks(Strict):
    """The checks of a model that was made to forget."""

    panel: ClassVar[str] = "Checks"

    at_least: Literal["SUPPRESSED", "PARTLY ERASED", "ERASED FOR A LINEAR READER"] | None = None
    """The verdict must be this one or a better one."""
    max_retain_loss: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest loss of accuracy on the other classes, such as 0.01."""


class AuditRecipe(Strict):
    """An audit: attacks on a model that was made to forget."""

    task: Literal["audit"] = "audit"
    directory: Annotated[str, Option("DIR")]
    """What `modhifi unlearn` wrote, or any model."""
    data: AuditData
    forget: Annotated[list[str], Option(panel="Data", metavar="CLASS")] = []
    """Index or name; several with commas, or repeated. The manifest of an artefact knows them."""
    original: Annotated[str | None, Option(panel="Loading", metavar="MODEL")] = None
    """The model before the edit; the manifest knows it."""
    reference: Annotated[str | None, Option(panel="Checks", metavar="MODEL")] = None
    """A model retrained without the classes, to compare."""
    checks: AuditChecks = AuditChecks()
    seed: Seed = 0
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images run at once."""
    device: Device = "auto"
    out: ReportOut = None
    summary: Summary = None


Task = PruneRecipe | UnlearnRecipe | HealRecipe | VerifyRecipe | AuditRecipe
Step = Annotated[Task, Field(discriminator="task")]
TASKS: dict[str, type[Task]] = {
    "prune": PruneRecipe,
    "unlearn": UnlearnRecipe,
    "heal": HealRecipe,
    "verify": VerifyRecipe,
    "audit": AuditRecipe,
}


class StepsRecipe(Strict):
    """Several steps, run in order; each writes to OUT/NAME, which a later one calls ``step:NAME``.

    ``sweep`` maps one path of the recipe (``steps.NAME.budget.flops``) to values, from the one most wanted to the
    least: all steps run with each, and the first value with which nothing fails is kept.
    """

    steps: Annotated[dict[str, Step], Field(min_length=1)]
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    out: Out = None
    summary: Summary = None

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


Recipe = Task | StepsRecipe


def parse(content: dict[str, Any], where: str | Path = "the recipe", flags: Mapping[str, str] | None = None) -> Recipe:
    """Validates a recipe of any task; raises ModhifiError that names the key (see `files.validate`)."""
    if "steps" in content:
        return validate(StepsRecipe, content, where, flags)
    task = content.get("task", "prune")
    if not isinstance(task, str) or task not in TASKS:
        raise ModhifiError(f"{where}: there is no task {task!r}; it is one of {', '.join(TASKS)}, or the key is steps")
    return validate(TASKS[task], content, where, flags)


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
