"""The recipe of a healing run."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from modhifi.healing.optimizers import OPTIMIZERS
from modhifi.healing.settings import HealSettings
from modhifi.registry import one_of
from modhifi.runs.recipes.files import Option, Strict
from modhifi.runs.recipes.prune import Checks, Count, DataSource, Device, ModelSource, Out, Seed, Sources, Summary


class HealData(DataSource):
    """The sources of samples to learn from and of held-out ones; labels are never used."""

    source: Annotated[Sources, Option("--data", panel="Most used")] = "synthetic"
    """Samples to learn from, without labels: images:DIR, text:PATH, hf:DATASET[:SPLIT], synthetic[:KIND], or self, text
    that the original writes. Several with commas, each with its share: self,text:FILE@0.2."""
    samples: Annotated[Count | None, Option(panel="Most used")] = None
    """Samples to learn from; by default 10,000 images (2,000 drawn, 500 inverted ones), 512 windows (128 on a CPU)."""
    only_this_data: bool = False
    """Learn from --data alone; by default 2,000 drawn images are added to fewer than 1,000, and text that a causal
    model writes itself to text:PATH."""


class HealBudget(Strict):
    """The end of a run: whichever comes first, ten minutes where neither is given.

    A network that forgot classes and lost nothing else ends after one pass over the samples where neither is given.
    """

    panel: ClassVar[str] = "Most used"

    steps: Count | None = None
    """Steps of the optimiser."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes; by default 10 where no steps are given."""


class HealMethod(Strict):
    """The method of distillation. None is the default of `modhifi.runs.defaults`."""

    panel: ClassVar[str] = "Method"

    optimizer: one_of(OPTIMIZERS) | None = None  # type: ignore[valid-type]
    """The optimiser; by default muon for networks with BatchNorm, adamw for others, for adapters and for networks that
    forgot classes and lost nothing else."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Largest learning rate; by default 0.02 of sgd, 0.0001 of adamw, 0.003 of muon."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Softens the logits of both models; by default 4 for images, 1 for text and where classes were forgotten."""
    blocks: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance between the outputs of blocks, in the channels that are left."""
    augment: Annotated[bool | None, Option("--augment/--no-augment")] = None
    """Flip and shift images at random; by default done."""
    batch_statistics: Annotated[bool, Option("--batch-statistics/--no-batch-statistics")] = False
    """Let BatchNorm normalise by the batch and follow it."""
    lora: Count | None = None
    """Train adapters of this rank in place of the weights (pip install 'modhifi[lora]'); they are merged at the end."""
    precision: Annotated[Literal["auto", "no", "bf16", "fp16"], Option(panel="Advanced")] = "auto"
    """Mixed precision; auto takes bf16 where a GPU or CPU has instructions for it, but for outputs that are values."""


class HealRecipe(Strict):
    """A healing run."""

    # The keys that set the end: one of them given beside a recipe takes the place of the recipe's own.
    alternatives: ClassVar[tuple[str, ...]] = ("budget.steps", "budget.minutes")

    task: Literal["heal"] = "heal"
    directory: Annotated[str, Option("DIR")]
    """An artefact of prune or unlearn."""
    against: Annotated[ModelSource | None, Option("--against", metavar="MODEL")] = None
    """The original, which teaches; by default the one that the manifest names."""
    data: HealData = HealData()
    budget: HealBudget = HealBudget()
    method: HealMethod = HealMethod()
    checks: Checks = Checks()
    seed: Seed = 0
    batch_size: Annotated[int, Field(ge=2)] | None = None
    """Items of one step; by default 128 images or 8 windows (4 on a CPU). Halved by itself where memory is short."""
    device: Device = "auto"
    out: Out = None
    export: Annotated[list[str], Option(panel="Output")] = []
    """Also write onnx or pt2 into the artefact; repeat it."""
    summary: Summary = None

    def settings(self) -> HealSettings:
        """The settings of the distillation, of a recipe that `modhifi.runs.defaults.complete_heal` has completed."""
        method = self.method
        assert method.optimizer is not None and method.learning_rate is not None
        assert method.temperature is not None and self.batch_size is not None
        return HealSettings(
            learning_rate=method.learning_rate,
            batch_size=self.batch_size,
            optimizer=method.optimizer,
            steps=self.budget.steps,
            minutes=self.budget.minutes,
            temperature=method.temperature,
            blocks=method.blocks,
            augment=bool(method.augment),
            batch_statistics=method.batch_statistics,
            lora=method.lora,
            precision=method.precision,
            seed=self.seed,
        )
