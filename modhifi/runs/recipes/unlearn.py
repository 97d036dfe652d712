"""The recipe of an unlearning run."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from modhifi.registry import one_of
from modhifi.runs.recipes.files import Option, Strict
from modhifi.runs.recipes.prune import Checks, Count, Device, ModelSource, Out, Seed, Summary
from modhifi.unlearning.methods import METHODS
from modhifi.unlearning.settings import UnlearnSettings


class UnlearnData(Strict):
    """The sources of samples; see :func:`modhifi.unlearning.data.load_unlearn_data`."""

    panel: ClassVar[str] = "Data"

    source: Annotated[str, Option("--data", panel="Most used")]
    """Images with the forgotten and other classes: images:DIR or hf:DATASET."""
    samples: Count = 2000
    """Number of images the edit sees."""
    forget: Annotated[str | None, Option("--forget-data")] = None
    """Samples of the forgotten classes; by default those in --data."""
    evaluate: str | None = None
    """Images for attacks and test; by default a part of --data."""
    evaluation_samples: Count = 2000
    """Number of images for attacks and test, as far as there are as many."""
    members: str | None = None
    """Training images of the forgotten classes, for the membership attack."""


class UnlearnMethod(Strict):
    """The method of forgetting; null is the method's own default."""

    panel: ClassVar[str] = "Method"

    name: Annotated[one_of(METHODS), Option("--method")] = "erase-writers"  # type: ignore[valid-type]
    """How to forget; head-mask is a control that erases nothing."""
    depth: Count | None = None
    """Blocks to edit, back from the head."""
    passes: Count | None = None
    """Times to go over them."""
    strength: Annotated[float, Field(gt=0)] | None = None
    """In the method's own unit."""
    retain_budget: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest loss of retain accuracy, such as 0.01; weakens the edit to fit."""
    only: list[str] = []
    """Edit operators of this pattern; repeat it."""
    exact: Annotated[bool, Option(panel="Advanced")] = True
    """Make the class means coincide exactly (erase-writers)."""
    forget_weight: Annotated[float, Field(gt=0, lt=1), Option(panel="Advanced")] = 0.1
    """Share of the forgotten samples in the pooled moments (erase-writers)."""
    damping: Annotated[float, Field(gt=0), Option(panel="Advanced")] = 1e-3
    """Damping, in units of a Gram's mean diagonal."""
    settle: bool = True
    """Give the BatchNorms behind the edit statistics that fit it."""


class UnlearnRecipe(Strict):
    """An unlearning run."""

    task: Literal["unlearn"] = "unlearn"
    model: ModelSource
    forget: Annotated[list[str], Field(min_length=1), Option(panel="Most used", metavar="CLASS")]
    """The class to forget, by index or name; several with commas, or repeated."""
    data: UnlearnData
    method: UnlearnMethod = UnlearnMethod()
    checks: Checks = Checks()
    reference: Annotated[str | None, Option(panel="Checks", metavar="MODEL")] = None
    """A model retrained without the classes, to compare."""
    seed: Seed = 0
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images run at once."""
    device: Device = "auto"
    out: Out = None
    summary: Summary = None

    def settings(self) -> UnlearnSettings:
        """The settings of the edit."""
        method = self.method
        return UnlearnSettings(
            method=method.name,
            depth=method.depth,
            passes=method.passes,
            strength=method.strength,
            only=tuple(method.only),
            exact=method.exact,
            forget_weight=method.forget_weight,
            damping=method.damping,
            settle=method.settle,
            batch_size=self.batch_size,
        )
