"""The inputs of a run: the model, the data, the original of an artefact."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from modhifi.calibration.block_stream import find_blocks
from modhifi.calibration.timeline import Timeline
from modhifi.data.in_memory import Data, images_of_other_size, source_name
from modhifi.data.mixture import Mixture, is_named, mixed
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import Manifest, loading_entry
from modhifi.models.offload import let_visit
from modhifi.models.trial import try_pass
from modhifi.progress import Progress, silent
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.recipes.prune import ModelSource, PruneRecipe


def forgotten_before(loaded: LoadedModel) -> list[int]:
    """The classes that an earlier edit of a loaded artefact has made it forget."""
    return [] if loaded.artifact is None else [entry.index for entry in loaded.artifact.manifest.forgotten]


def seen_before(loaded: LoadedModel) -> list[str]:
    """The hashes of the samples that earlier edits of a loaded artefact were calibrated on, or learnt from."""
    return [] if loaded.artifact is None else [*loaded.artifact.manifest.calibration.hashes]


@dataclass(frozen=True)
class Given:
    """Models and data that a Python program holds; they take the place of those that the recipe names.

    ``model`` is the original, of an edit or of a comparison; ``edited`` the model to verify or to audit.
    """

    model: LoadedModel | None = None
    data: Data | None = None
    evaluate: Data | None = None
    edited: nn.Module | None = None

    def seen_by(self, loaded: LoadedModel) -> LoadedModel:
        """A model of images whose example is one of the program's own, where these have another size.

        Raises ModhifiError where it takes no such size.
        """
        other = None if self.data is None else images_of_other_size(self.data, loaded)
        if other is None:
            return loaded
        try_pass(loaded, other)
        return loaded.with_example(other)


NOTHING = Given()
# What a run writes to.
WRITTEN = ("out", "summary")
# What a recipe reads from disk: sources of data by their beginning, models by their key.
FILES = ("images:", "text:", "audio:", "pairs:", "hf:")
PATHS = {"directory", "original", "reference"}
PARTS = [(part, key) for part in ("model", "against") for key in ("name", "weights")]


def local_paths(content: Any) -> Iterator[Path]:
    """The files and directories that exist among the strings of a recipe's content, but for what the run writes.

    A string is a path, or one behind a prefix (``images:DIR``) and in front of a split (``hf:DIR:train``).
    """
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in WRITTEN:
                yield from local_paths(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from local_paths(value)
    elif isinstance(content, str):
        behind = content.partition(":")[2]
        # A share may stand behind a source in a mixture.
        for text in dict.fromkeys((content, behind, behind.rpartition(":")[0], behind.rpartition("@")[0])):
            path = Path(os.path.expanduser(text))
            if text and os.path.exists(path):
                yield path


def located(content: Any, keys: tuple[str, ...] = ()) -> Any:
    """A recipe's content whose local paths are absolute, so that it repeats the run from any directory.

    ``keys`` lead to the content from the top of the recipe.
    """
    if isinstance(content, dict):
        return {key: located(value, (*keys, key)) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [located(value, keys) for value in content]
    # Other words, of a selector for instance, may be names of files by chance.
    if not isinstance(content, str):
        return content
    of_model = keys[-2:] in PARTS
    if content.startswith(FILES) and not of_model:
        start = content.index(":") + 1
    elif set(keys[-1:]) & PATHS or of_model:
        start = 0
    else:
        return content
    behind = content[start:]
    for text in (behind, *((behind.rpartition(":")[0], behind.rpartition("@")[0]) if start else ())):
        if text and os.path.exists(os.path.expanduser(text)):
            return content[:start] + str(Path(os.path.expanduser(text)).absolute()) + content[start + len(text) :]
    return content


def load_source(source: ModelSource) -> LoadedModel:
    """Loads the model that a recipe names; raises ModhifiError as :func:`modhifi.models.load.load_model` does."""
    return load_model(
        source.name,
        pretrained=source.pretrained,
        model_args=source.args,
        weights=source.weights,
        revision=source.revision,
        gguf_file=source.gguf_file,
        trust_remote_code=source.trust_remote_code,
        values=source.values,
    )


def original_of(manifest: Manifest) -> ModelSource:
    """The recipe entry that loads the model that an artefact was made from; whoever wrote it, no code is trusted.

    Raises ModhifiError where the manifest does not say how to load it.
    """
    base, source = manifest.base, loading_entry(manifest)
    if base.source.startswith("module:"):
        raise ModhifiError(
            f"the original is a {base.source.removeprefix('module:')} that a Python program held; give it: "
            "--against MODEL, from Python against="
        )
    if source.get("name") != base.source and not os.path.isabs(str(source.get("name"))):
        source = {"name": base.source, "revision": base.revision}
    if base.source.startswith("timm:"):  # a directory states its own arguments
        source = {**source, "args": source.get("args") or base.args}
    try:
        return ModelSource(**{**source, "trust_remote_code": False, "values": base.values})
    except ValidationError as error:
        raise ModhifiError(f"the manifest does not say how to load {base.source}; give the original") from error


def shortage(recipe: PruneRecipe, calibration: Samples, held: Samples) -> list[str]:
    """A sentence where there are fewer samples than were asked for: how many calibrate, and how many are held out."""
    asked, checked = recipe.data.samples or 0, recipe.data.evaluation_samples or 0
    if len(calibration) >= asked and len(held) >= min(checked, asked):
        return []
    return [
        f"{len(calibration):,} samples calibrate and {len(held):,} are held out, where {asked:,} and {checked:,} were "
        "asked for: there are no more"
    ]


def load_data(
    recipe: PruneRecipe | HealRecipe,
    loaded: LoadedModel,
    given: Given = NOTHING,
    progress: Progress = silent,
    before: Collection[str] = (),
) -> tuple[Samples, Samples]:
    """Loads calibration and held-out samples, disjoint by content, and by document where text is cut from documents.

    None of the samples with the hashes ``before``, which are in the model's weights already, is held out.

    Of a mixture every source has as many calibration samples as are asked for, whose moments its share then weighs; to
    learn from, as of the held-out ones, it has its share of them. Raises ModhifiError where too few samples are
    left for either.
    """
    data, seed = recipe.data, recipe.seed
    # What strings name is in the recipe, completed.
    named = given.data is None or isinstance(given.data, str) or is_named(given.data)
    source = Mixture.of(data.source if named else given.data)
    evaluate = data.evaluate if given.evaluate is None else given.evaluate
    held_out = source if evaluate is None else Mixture.of(evaluate)
    assert data.samples is not None and data.evaluation_samples is not None

    def load(spec: Data, n: int) -> Samples:
        return load_samples(spec, loaded, n=n, seed=seed, window=data.window, progress=progress)

    def enough(spec: Data, n: int, wanted: int, seen: Collection[str]) -> Samples:
        """``n`` samples, and more where too few of them are new: a model takes long to write what is not needed."""
        samples = load(spec, n)
        missing = wanted - sum(content_hash not in seen for content_hash in samples.hashes)
        return load(spec, n + len(seen)) if missing > 0 and len(samples) >= n else samples

    counts = held_out.counts(data.evaluation_samples)
    amounts = source.counts(data.samples) if isinstance(recipe, HealRecipe) else [data.samples] * len(source.shares)
    parts: list[tuple[str, float, Samples]] = []
    held: dict[int, Samples] = {}
    for (spec, share), amount in zip(source, amounts, strict=True):
        name = str(source_name(spec))
        # Samples of one source are separated by document, which hashes of windows cannot do.
        number = _number(spec, held_out, by_identity=evaluate is None)
        if number is None:
            parts.append((name, share, load(spec, amount)))
            continue
        samples = enough(spec, amount + counts[number], counts[number], before)
        if len(samples) < 4:
            raise ModhifiError(
                f"{samples.description}: {len(samples)} different usable samples are too few to calibrate and to "
                "check; give at least 4"
            )
        own, held[number] = _split(samples, amount, counts[number], before)
        parts.append((name, share, own))
    calibration = mixed(parts)
    seen = {*calibration.hashes, *before}
    for number, (spec, _) in enumerate(held_out):
        wanted = counts[number]
        samples = held[number] if number in held else enough(spec, wanted + len(calibration), wanted, seen)
        held[number] = _unseen(samples, seen, counts[number])
    return calibration, mixed(
        [(str(source_name(spec)), share, held[number]) for number, (spec, share) in enumerate(held_out)]
    )


def _split(samples: Samples, amount: int, count: int, before: Collection[str]) -> tuple[Samples, Samples]:
    """At most ``amount`` samples to calibrate on and ``count`` to hold out, those of ``before`` among the former.

    No document has windows on both sides, unless there is but one.
    """
    old = [content_hash in before for content_hash in samples.hashes]
    if samples.units is not None:
        documents = {unit for unit, known in zip(samples.units, old, strict=True) if known}
        if len(documents) < len(set(samples.units)):
            old = [unit in documents for unit in samples.units]
    plain = samples.split(amount, count)
    known = [i for i, is_old in enumerate(old) if is_old][:amount]
    if not known:
        return plain
    fresh = samples.subset(i for i, is_old in enumerate(old) if not is_old)
    # Of few samples no more are held out than without those that are known.
    wanted = len(plain[1])
    room = min(amount - len(known), len(fresh) - wanted)
    if room > 0:
        more, held = fresh.split(room, wanted)
    else:
        more, held = fresh.subset(()), fresh.subset(range(min(wanted, len(fresh))))
    ours = {*known}.union(i for i, content_hash in enumerate(samples.hashes) if content_hash in {*more.hashes})
    return samples.subset(sorted(ours)), held


def _number(spec: Data, mixture: Mixture, by_identity: bool) -> int | None:
    """The number of a source in a mixture, None if it is not in there; what a program holds is known by identity."""
    for number, (other, _) in enumerate(mixture):
        if (isinstance(spec, str) and isinstance(other, str) and spec == other) or (by_identity and spec is other):
            return number
    return None


def _unseen(held: Samples, seen: Collection[str], n: int) -> Samples:
    """The first ``n`` samples that are not in ``seen``; raises ModhifiError where there is none."""
    unseen = [i for i, h in enumerate(held.hashes) if h not in seen][:n]
    if not unseen:
        raise ModhifiError("every evaluation sample is also a calibration sample; give other data to --evaluate")
    return held if len(unseen) == len(held) else held.subset(unseen)


def place(loaded: LoadedModel, device: torch.device | str, offload: bool) -> None:
    """Moves a model to a device, in place.

    With ``offload`` its blocks stay in main memory and are on the device only while they run.
    """
    if offload:
        timeline = Timeline(loaded.model, lambda: loaded.run(loaded.example))
        let_visit(loaded.model, find_blocks(timeline), device)
    else:
        loaded.model.to(device)
