"""The inputs of a healing run: the pair of models, and the samples to learn from, to choose by and to hold out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from modhifi.artifacts.export import require_export
from modhifi.data.mixture import mixed
from modhifi.data.samples import Samples
from modhifi.data.synthetic import drawn
from modhifi.errors import ModhifiError
from modhifi.healing.blocks import Cut
from modhifi.healing.lora import check_lora
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import Manifest
from modhifi.models.trial import try_pass
from modhifi.progress import Progress
from modhifi.pruning.stages import find_structure
from modhifi.runs.inputs import Given, load_data, original_of, seen_before
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.recipes.prune import ModelSource
from modhifi.runs.verify import counts_in_original, load_pair

# The samples that choose the best weights: a share of those to learn from, and no more than this many, or windows of
# text, where every position tells: both models read them in full precision twenty times.
VALIDATION, MOST_VALIDATION, MOST_WINDOWS = 0.1, 500, 10
# To fewer images than this so many drawn ones are added: a student soon knows a few hundred by heart
# (eval/results/heal_few.md). Of few images a larger share chooses.
FEW, DRAWN, FEW_VALIDATION = 1000, 2000, 0.2


@dataclass(frozen=True)
class Patient:
    """What is healed: ``edited`` made from ``original``, its ``manifest`` (None of a module), forgotten classes.

    ``cut`` is what it lacks of the original, as far as its manifest tells.
    """

    original: LoadedModel
    edited: LoadedModel
    manifest: Manifest | None
    closed: tuple[int, ...]
    cut: Cut


@dataclass(frozen=True)
class LearningData:
    """Disjoint samples: to learn from, to choose the best weights on, held out.

    ``given`` are those of the recipe's data, ``drawn`` is how many others were added to them. Some may come several
    times among those to learn from: ``learnt`` are different ones.
    """

    given: Samples
    train: Samples
    validation: Samples
    held: Samples
    drawn: int = 0

    @property
    def learnt(self) -> int:
        return len(set(self.train.hashes))

    def remarks(self) -> list[str]:
        """A sentence where more is learnt from than was given."""
        if not self.drawn:
            return []
        return [
            f"{self.drawn:,} drawn images are learnt from beside the {len(self.given):,} of --data; --only-this-data "
            "leaves them out"
        ]


def load_patient(recipe: HealRecipe, given: Given) -> Patient:
    """Loads the pair; raises ModhifiError for what the recipe asks of a model that has no such thing."""
    original, edited, manifest = load_pair(recipe.directory, recipe.against, given)
    if reason := original.incomparable():
        raise ModhifiError(f"nothing can be learnt from the original: {reason}; wrap it to return one tensor")
    recipe.checks.tolerances().fit(original)
    require_export(original, recipe.export)
    if recipe.method.lora is not None:
        if recipe.method.optimizer == "muon":
            raise ModhifiError(
                "muon's steps are relative to the weights, and adapters start at zero; take adamw or sgd"
            )
        if original.framework != "transformers":
            raise ModhifiError("--lora is for models of transformers; leave it out to train the weights themselves")
        check_lora()
    closed = () if manifest is None else tuple(entry.index for entry in manifest.forgotten)
    edits = [] if manifest is None else manifest.base.edits_before
    if not closed and (unlearned := [edit for edit in edits if edit.get("task") == "unlearn"]):
        raise ModhifiError(
            f"{recipe.directory} was made from {unlearned[-1].get('source')}, which forgot classes, by a modhifi that "
            "did not write down which; they would be taught again: make it again"
        )
    return Patient(original, edited, manifest, closed, _cut(original, manifest))


def _cut(original: LoadedModel, manifest: Manifest | None) -> Cut:
    if manifest is None or not manifest.groups or not counts_in_original(manifest):
        return Cut()
    if any(group.kind == "experts" for group in manifest.groups):
        return Cut()
    return Cut.of(original.model, find_structure(original, on_request=True), manifest.plan())


def teacher_of(recipe: HealRecipe, patient: Patient) -> ModelSource:
    """The recipe entry of the original, for whoever loads it again."""
    if recipe.against is not None or patient.manifest is None:
        return recipe.against or ModelSource(name=patient.original.source)
    return original_of(patient.manifest)


def load_learning_data(recipe: HealRecipe, patient: Patient, given: Given, progress: Progress) -> LearningData:
    """Loads the samples; raises ModhifiError where too few are left to learn from."""
    loaded, held = load_data(recipe, patient.original, given, progress, seen_before(patient.edited))
    assert recipe.batch_size is not None
    for part in (loaded, held):
        try_pass(patient.original, part.first())
    samples = _retained(patient, loaded, recipe.batch_size) if patient.closed else loaded
    most = MOST_WINDOWS if patient.original.reads_tokens else MOST_VALIDATION
    beside = None if recipe.data.only_this_data else _drawn_beside(samples, patient.original, recipe.seed)
    count = min(most, max(1, round((VALIDATION if beside is None else FEW_VALIDATION) * len(samples))))
    if len(samples) - count < 2 or all(len(part) < 2 for _, _, part in samples.parts()):
        raise ModhifiError(f"{len(samples)} samples are too few to learn from; give more data, or --samples")
    if beside is not None and patient.closed:
        beside = _retained(patient, beside, recipe.batch_size)
    # The original may take nearly all of them for a forgotten class.
    if beside is None or len(beside) <= count:
        return LearningData(loaded, *_separated(samples.parts(), count), held)
    # Half of the mass each. By real ones alone too little could be told: they have often calibrated the cut, too.
    halves = [(name, share / 2, part) for name, share, part in samples.parts()]
    train, validation = _separated([*halves, ("synthetic", 0.5, beside)], 2 * count)
    return LearningData(loaded, train, validation, held, len(beside))


def _separated(parts: Sequence[tuple[str, float, Samples]], count: int) -> tuple[Samples, Samples]:
    """Samples to learn from, and about ``count`` to choose by: of both every source, in its share of the mass.

    Of a source that has too few for its share items come several times among those to learn from.
    """
    learnt, chosen = list[tuple[str, float, Samples]](), list[tuple[str, float, Samples]]()
    for name, share, samples in parts:
        few = min(max(1, round(share * count)), len(samples) - 1)
        first, second = samples.split(len(samples) - few, few)
        # All of one document, or nearly all of the one to choose by.
        if not len(second) or len(first) < (len(samples) - few) / 2:
            first, second = replace(samples, units=None).split(len(samples) - few, few)
        learnt.append((name, share, first))
        if len(second):
            chosen.append((name, share, second))
    most = max(len(samples) / share for _, share, samples in learnt)
    learnt = [(name, share, _often(part, round(share * most / len(part)))) for name, share, part in learnt]
    return mixed(learnt), mixed(chosen)


def _often(samples: Samples, times: int) -> Samples:
    """Every item so many times, at least once."""
    often = [*range(len(samples))] * max(1, times)
    return samples if times <= 1 else replace(samples.subset(often), description=samples.description)


def _drawn_beside(samples: Samples, original: LoadedModel, seed: int) -> Samples | None:
    """Drawn images for few real ones; None where these are enough, or where nothing like them can be drawn."""
    if samples.synthetic or original.kind != "image" or len(samples) >= FEW:
        return None
    try:
        beside = drawn("mixed", original, DRAWN, seed, balanced=False)
    except ModhifiError:
        return None
    ours, theirs = samples.load(0), beside.load(0)
    return beside if (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) else None


@torch.no_grad()
def _retained(patient: Patient, samples: Samples, batch_size: int) -> Samples:
    """The samples that the original takes for none of the forgotten classes, and that are labelled with none."""
    top = torch.cat([patient.original.logits(batch).argmax(1).cpu() for batch in samples.batches(batch_size)])
    closed = torch.tensor(patient.closed)
    forgotten = torch.isin(top, closed)
    if samples.labels is not None:
        forgotten |= torch.isin(samples.labels, closed)
    return samples.subset(torch.nonzero(~forgotten).flatten())
