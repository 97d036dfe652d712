"""The defaults that depend on the kind of model and on the device; they fill the gaps of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from modhifi.data.mixture import Mixture, beside_self
from modhifi.data.text import window_of
from modhifi.errors import ModhifiError
from modhifi.healing.optimizers import OPTIMIZERS
from modhifi.models.hooks import normalises_by_batch
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.layouts.base import Rounding
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.recipes.prune import ModelSource, PruneRecipe
from modhifi.runs.recipes.tasks import VerifyRecipe
from modhifi.structure.families import says


@dataclass(frozen=True)
class Amounts:
    """Amounts of data: items to calibrate on and to hold out, items run at once, tokens in an item of text."""

    samples: int
    evaluation_samples: int
    batch_size: int
    window: int | None = None


# What a GPU's tensor cores and a CPU's vectors take at once, in bytes of one channel (NVIDIA, "Matrix Multiplication
# Background": dimensions that are multiples of 128 bytes; AVX2: 32 bytes, of which wider vectors are multiples).
GPU_BYTES, CPU_BYTES = 128, 32
# Weights of four bits come in groups that share a scale (GPTQ and AWQ: 128), and a width has to be made of whole ones.
INT4_GROUP = 128

# What a healing run learns from: images that were drawn cost time, and inverted ones much of it.
HEAL_IMAGES, HEAL_DRAWN, HEAL_INVERTED = Amounts(10_000, 256, 128), Amounts(2_000, 256, 128), Amounts(500, 256, 128)
HEAL_TEXT, HEAL_TEXT_ON_CPU = Amounts(512, 32, 8, 1024), Amounts(128, 16, 4, 512)
MINUTES = 10.0
# Temperatures of images, and of text and teachers without a class.
SOFT, PLAIN = 4.0, 1.0

IMAGES = Amounts(256, 256, 32)
TEXT = Amounts(128, 32, 4, 1024)
TEXT_ON_CPU = Amounts(64, 16, 4, 512)
# Sounds, series, and what is read with text: their items are sequences of a length that the model sets.
SEQUENCES = Amounts(128, 64, 8)


def amounts(loaded: LoadedModel, device: torch.device | str) -> Amounts:
    """The default amounts for a model on a device."""
    if loaded.parts:
        return SEQUENCES
    if loaded.kind not in ("text", "encoder"):
        return IMAGES
    return TEXT_ON_CPU if torch.device(device).type == "cpu" else TEXT


def held_amounts(loaded: LoadedModel, device: torch.device | str) -> Amounts:
    """The default amounts of a verification: 1,000 images, or the windows that a pruning run would hold out."""
    usual = amounts(loaded, device)
    if usual.window is None:
        return replace(usual, evaluation_samples=1000)
    return replace(usual, window=min(usual.window, window_of(loaded, None)))


def rounding_for(loaded: LoadedModel, device: torch.device | str, serve: str | None = None) -> Rounding:
    """What widths are multiples of by default: 8 of float32 on a CPU, 64 of half precision on a GPU.

    It is less in groups that are hardly wider and where the budget cannot be met otherwise. To ``serve`` as ``int4``
    every width is one of whole groups of weights.
    """
    if serve == "int4":
        return Rounding(INT4_GROUP)
    dtype = next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), torch.float32)
    size = CPU_BYTES if torch.device(device).type == "cpu" else GPU_BYTES
    return Rounding(max(1, size // dtype.itemsize), less=True)


def complete_verify(recipe: VerifyRecipe, loaded: LoadedModel, device: torch.device | str) -> VerifyRecipe:
    """The verification of an edit of ``loaded`` with every default written out."""
    usual, data = held_amounts(loaded, device), recipe.data
    amount = {"samples": data.samples or usual.evaluation_samples, "window": data.window or usual.window}
    return recipe.model_copy(
        update={
            "data": data.model_copy(update=amount),
            "batch_size": recipe.batch_size or usual.batch_size,
        }
    )


def calibrating(source: str | list[str], loaded: LoadedModel, alone: bool) -> tuple[str | list[str], list[str]]:
    """What a model is calibrated or healed on, and remarks: files of text beside its own writing, but ``alone``.

    One kind of text alone ruins the model for every other one (docs/language-models.md, docs/after-pruning.md).
    """
    together = beside_self(source)
    if alone or loaded.kind != "text" or together == ([source] if isinstance(source, str) else source):
        return source, []
    share = Mixture.of(together).shares[-1]
    return together, [f"{share:.3g} of the mass is text that the model writes itself; --only-this-data leaves it out"]


def complete(recipe: PruneRecipe, loaded: LoadedModel, device: torch.device | str) -> tuple[PruneRecipe, list[str]]:
    """The pruning run with every default written out, so that it can be repeated as recorded, and remarks on them.

    Models of transformers, and timm's vision transformers, get one width for all blocks, which their own configuration
    can express; networks with BatchNorm are compensated sequentially (docs/method.md); a Gram of tokens uses all of
    them, because neighbouring pixels repeat each other and tokens do not.
    Raises ModhifiError for a window that the model does not take.
    """
    usual, data, method, window = amounts(loaded, device), recipe.data, recipe.method, recipe.data.window
    source, mixed = calibrating(data.source, loaded, data.only_this_data)
    remarks = []
    if usual.window is not None:
        window = window_of(loaded, window) if window else min(usual.window, window_of(loaded, None))
    if usual is TEXT_ON_CPU and (data.samples is None or data.window is None):
        remarks.append(
            f"on a CPU {data.samples or usual.samples} windows of {window} tokens calibrate, where a GPU would take "
            f"{TEXT.samples} of {TEXT.window}; --samples and --window change that"
        )
    remarks += mixed
    sequential = method.sequential
    if sequential == "auto":
        wins = COMPENSATIONS[method.compensate].least_squares and normalises_by_batch(loaded.model)
        sequential = "dense" if wins else None
    rows = method.rows_per_column
    one_width = loaded.framework == "transformers" or says(loaded.model, "neurons")
    return recipe.model_copy(
        update={
            "batch_size": recipe.batch_size or usual.batch_size,
            "data": data.model_copy(
                update={
                    "source": source,
                    "samples": data.samples or usual.samples,
                    "evaluation_samples": data.evaluation_samples or usual.evaluation_samples,
                    "window": window,
                }
            ),
            "method": method.model_copy(
                update={
                    "sequential": None if sequential == "none" else sequential,
                    "layout": method.layout or ("uniform" if one_width else "global"),
                    "rows_per_column": rows if rows is not None else 2 if usual is IMAGES else 0,
                }
            ),
        }
    ), remarks


def complete_heal(
    recipe: HealRecipe,
    loaded: LoadedModel,
    device: torch.device | str,
    against: ModelSource,
    *,
    forgot: bool = False,
    whole: bool = False,
) -> tuple[HealRecipe, list[str]]:
    """The healing run of a version of ``loaded`` with every default but its end written out, and remarks on them.

    ``against`` names ``loaded``; ``forgot`` says that the version forgot classes, ``whole`` that it has the original's
    shapes. Raises ModhifiError for a window that the model does not take.
    """
    data, method = recipe.data, recipe.method
    source, remarks = calibrating(data.source, loaded, data.only_this_data)
    text = amounts(loaded, device).window is not None
    if text:
        usual = HEAL_TEXT_ON_CPU if torch.device(device).type == "cpu" else HEAL_TEXT
    else:
        drawn = HEAL_INVERTED if source == "synthetic:invert" else HEAL_DRAWN
        sources = [source] if isinstance(source, str) else source
        usual = drawn if all(name.startswith("synthetic") for name in sources) else HEAL_IMAGES
    window = data.window
    if usual.window is not None:
        window = window_of(loaded, window) if window else min(usual.window, window_of(loaded, None))
    samples, batch_size = data.samples or usual.samples, recipe.batch_size or usual.batch_size
    # A model that forgot classes and lost nothing else is near its teacher: large steps take it away.
    if method.augment and (loaded.example.ndim != 4 or loaded.packing is not None):
        raise ModhifiError("--augment flips and shifts images, and this model reads none; leave it out")
    large = _has_batchnorm(loaded) and method.lora is None and not (forgot and whole)
    optimizer = method.optimizer or ("muon" if large else "adamw")
    completed = recipe.model_copy(
        update={
            "against": against,
            "batch_size": batch_size,
            "data": data.model_copy(
                update={
                    "source": source,
                    "samples": samples,
                    "evaluation_samples": data.evaluation_samples or usual.evaluation_samples,
                    "window": window,
                }
            ),
            "method": method.model_copy(
                update={
                    "optimizer": optimizer,
                    "learning_rate": method.learning_rate or OPTIMIZERS[optimizer].rate,
                    "temperature": method.temperature or (PLAIN if text or forgot else SOFT),
                    # Of large values that differ little bfloat16 leaves no difference.
                    "precision": "no" if method.precision == "auto" and loaded.gives_values else method.precision,
                    "augment": loaded.kind == "image" if method.augment is None else method.augment,
                }
            ),
        }
    )
    return completed, remarks


def with_end(recipe: HealRecipe, samples: int, *, one_pass: bool) -> HealRecipe:
    """The healing run with its end written out: ten minutes, or ``one_pass`` over the ``samples`` to learn from.

    That is for a model that forgot classes and lost nothing else: more passes bring back what the teacher's features
    knew of the classes (eval/results/heal_unlearned.md).
    """
    budget = recipe.budget
    if budget.steps is not None or budget.minutes is not None:
        return recipe
    assert recipe.batch_size is not None
    end = {"steps": max(1, samples // recipe.batch_size)} if one_pass else {"minutes": MINUTES}
    return recipe.model_copy(update={"budget": budget.model_copy(update=end)})


def _has_batchnorm(loaded: LoadedModel) -> bool:
    return any(isinstance(module, _BatchNorm) for module in loaded.model.modules())
