"""The defaults that depend on the kind of model and on the device; they fill the gaps of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from modhifi.data.mixture import Mixture, beside_self
from modhifi.data.text import window_of
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.layouts.base import Rounding
from modhifi.runs.recipe import PruneRecipe
from modhifi.runs.recipe_tasks import VerifyRecipe
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

IMAGES = Amounts(256, 256, 32)
TEXT = Amounts(128, 32, 4, 1024)
TEXT_ON_CPU = Amounts(64, 16, 4, 512)


def amounts(loaded: LoadedModel, device: torch.device | str) -> Amounts:
    """The default amounts for a model on a device."""
    if loaded.kind not in ("text", "encoder"):
        return IMAGES
    return TEXT_ON_CPU if torch.device(device).type == "cpu" else TEXT


def held_amounts(loaded: LoadedModel, device: torch.device | str) -> Amounts:
    """The default amounts of a verification: 1,000 images, or the windows that a pruning run would hold out."""
    usual = amounts(loaded, device)
    if usual.window is None:
        return replace(usual, evaluation_samples=1000)
    return replace(usual, window=min(usual.window, window_of(loaded, None)))


def rounding_for(loaded: LoadedModel, device: torch.device | str) -> Rounding:
    """What widths are multiples of by default: 8 of float32 on a CPU, 64 of half precision on a GPU.

    It is less in groups that are hardly wider and where the budget cannot be met otherwise.
    """
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
    """What calibrates a model, and remarks: files of text beside its own writing, unless they are to be ``alone``.

    A cut by one kind of text alone ruins the model for every other one (docs/language-models.md).
    """
    together = beside_self(source)
    if alone or loaded.kind != "text" or together == ([source] if isinstance(source, str) else source):
        return source, []
    share = Mixture.of(together).shares[-1]
    return together, [f"{share:.3g} of the mass is text that the model writes itself; --only-this-data leaves it out"]


def complete(recipe: PruneRecipe, loaded: LoadedModel, device: torch.device | str) -> tuple[PruneRecipe, list[str]]:
    """The pruning run with every default written out, so that it can be repeated as recorded, and remarks on them.

    Models of transformers, and timm's vision transformers, get one width for all blocks, which their own configuration
    can express; a Gram of tokens uses all of them, because neighbouring pixels repeat each other and tokens do not.
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
                    "layout": method.layout or ("uniform" if one_width else "global"),
                    "rows_per_column": rows if rows is not None else 2 if usual is IMAGES else 0,
                }
            ),
        }
    ), remarks
