"""Forget and retain samples: from class folders, or unlabelled images that the model labels itself."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modhifi.data.image_inputs import class_count, classes_by_name, plain
from modhifi.data.in_memory import Data, source_name
from modhifi.data.labels import class_name, label_samples, populations
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.models.trial import try_pass

# A class mean of fewer samples says little about the class.
FEWEST = 16


@dataclass(frozen=True)
class UnlearnData:
    """Three disjoint, labelled sets: what the edit sees, what the attacks learn from, what everything is tested on.

    ``groups`` int64 ``(n,)`` of the edit set: 0 retained, j the j-th forgotten class, -1 unused.
    """

    edit: Samples
    groups: Tensor
    fit: Samples
    test: Samples
    notes: tuple[str, ...]


def count_classes(loaded: LoadedModel) -> int:
    """The number of classes of an image classifier. Raises ModhifiError for any other model."""
    classes = None if loaded.kind == "text" else class_count(loaded)
    if classes is None:
        kind = "a language model" if loaded.kind == "text" else "no image classifier of two or more classes"
        raise ModhifiError(f"{loaded.source} is {kind}: there is no class to forget; give a classifier")
    return classes


def find_classes(wanted: Sequence[str], loaded: LoadedModel) -> tuple[int, ...]:
    """Class indices for indices or names (whole labels, or any of their comma-separated synonyms), in the given order.

    One string may hold several, separated by commas. Raises ModhifiError for a class that does not exist, naming the
    nearest, and where no class would be left.
    """
    total = count_classes(loaded)
    known = classes_by_name(loaded.labels)
    indices: list[int] = []
    for text in wanted:
        whole = plain(text) in known
        for part in [text] if whole else text.split(","):
            indices.append(_class(part.strip(), known, total, loaded))
    indices = list(dict.fromkeys(indices))
    if not indices:
        raise ModhifiError("no class to forget; give --forget with a class index or name")
    if len(indices) > total - 2:
        raise ModhifiError(f"{len(indices)} of {total} classes would be forgotten; leave at least two to tell apart")
    return tuple(indices)


def _class(name: str, known: Mapping[str, Sequence[int]], total: int, loaded: LoadedModel) -> int:
    meant = known.get(plain(name), ())
    if len(meant) > 1:
        raise ModhifiError(f"'{name}' is the name of the classes {' and '.join(map(str, meant))}; give one's index")
    if meant:
        return meant[0]
    if name.isdecimal():
        if int(name) >= total:
            raise ModhifiError(f"class {name} does not exist; {loaded.source} has classes 0 to {total - 1}")
        return int(name)
    if not known:
        raise ModhifiError(f"{loaded.source} has no class names, so '{name}' means nothing; use 0 to {total - 1}")
    near = difflib.get_close_matches(plain(name), known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"it knows {', '.join(list(known)[:5])}, …"
    raise ModhifiError(f"{loaded.source} has no class '{name}'; {hint}")


def load_unlearn_data(
    loaded: LoadedModel,
    classes: Sequence[int],
    *,
    source: Data,
    samples: int,
    forget_source: str | None = None,
    evaluate: Data | None = None,
    evaluation_samples: int = 2000,
    earlier: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 64,
) -> UnlearnData:
    """Load, label and split.

    ``forget_source`` holds samples of the forgotten classes alone; those in ``source`` are then dropped with a note.
    Without ``evaluate`` what ``samples`` leave of ``source`` (and of ``forget_source``) is set aside for the attacks
    and the test: half of it at least.
    ``earlier`` classes, forgotten in rounds before, are in no population. Raises ModhifiError where a forgotten class
    has fewer than ``FEWEST`` samples in a set, or the others together have.
    """
    notes: list[str] = []

    def load(spec: Data, n: int) -> Samples:
        unlabelled = load_samples(spec, loaded, n=n, seed=seed)
        try_pass(loaded, unlabelled.first())
        loaded_samples, remark = label_samples(loaded, unlabelled, batch_size)
        if loaded_samples.skipped:
            notes.append(f"{len(loaded_samples.skipped)} unreadable items of {source_name(spec)} were skipped")
        notes.extend([remark if evaluate is None else f"{source_name(spec)}: {remark}"] if remark else [])
        return loaded_samples

    both = load(source, samples if evaluate is not None else samples + evaluation_samples)
    if forget_source is not None:
        forgotten = _forget_set(loaded, forget_source, classes, samples, seed, batch_size)
        both = _with_forget(both, forgotten, classes, notes)
    again = 0
    if evaluate is not None:
        found = load(evaluate, evaluation_samples)
        edit, rest = both, _fresh(found, both)
        again = len(found) - len(rest)
    else:
        first = _every(both, min(samples, len(both) - len(both) // 2), len(both))
        edit, rest = both.subset(torch.nonzero(first).flatten()), both.subset(torch.nonzero(~first).flatten())
    half = _every(rest, 1, 2)
    fit, test = rest.subset(torch.nonzero(half).flatten()), rest.subset(torch.nonzero(~half).flatten())
    if earlier:
        notes.append(f"classes {', '.join(map(str, earlier))} were forgotten before and count as neither")
    groups = populations(edit, classes, earlier)
    if again and not len(rest):
        raise ModhifiError(
            f"all {again} images to evaluate on are also among those that the edit sees; give others, or none: a part "
            "of the data is then set aside"
        )
    for name, part in (("edit", edit), ("attacks", fit), ("test", test)):
        among = again if part is not edit else 0
        _require(name, populations(part, classes, earlier), classes, loaded, among)
    return UnlearnData(edit, groups, fit, test, tuple(notes))


def _require(name: str, groups: Tensor, classes: Sequence[int], loaded: LoadedModel, again: int) -> None:
    """Raises ModhifiError for too few samples; ``again`` were left out because the edit sees them."""
    left_out = f" ({again} to evaluate on were left out, as the edit sees them)" if again else ""
    for number, index in enumerate(classes, start=1):
        have = int((groups == number).sum())
        if have < FEWEST:
            raise ModhifiError(
                f"{have} samples of the class {class_name(loaded, index)} are left for the {name} part, and at least "
                f"{FEWEST} are needed in each of edit, attacks and test; there are {len(groups)} images in that part"
                f"{left_out}: give more of them, raise --samples and --evaluation-samples, or give --forget-data"
            )
    if int((groups == 0).sum()) < FEWEST:
        raise ModhifiError(
            f"fewer than {FEWEST} samples of retained classes for the {name} part{left_out}; give more --data"
        )


def _forget_set(loaded: LoadedModel, spec: str, classes: Sequence[int], n: int, seed: int, batch_size: int) -> Samples:
    samples = load_samples(spec, loaded, n=2 * n, seed=seed)
    if samples.labels is None and len(classes) == 1:
        return replace(samples, labels=torch.full((len(samples),), classes[0]))
    return label_samples(loaded, samples, batch_size)[0]


def _with_forget(retain: Samples, forgotten: Samples, classes: Sequence[int], notes: list[str]) -> Samples:
    assert retain.labels is not None and forgotten.labels is not None
    own = forgotten.subset(torch.nonzero(torch.isin(forgotten.labels, torch.tensor(list(classes)))).flatten())
    # The forget data may be a folder of every class.
    seen = set(own.hashes)
    inside = torch.isin(retain.labels, torch.tensor(list(classes)))
    again = torch.tensor([h in seen for h in retain.hashes], dtype=torch.bool)
    if bool((inside | again).any()):
        notes.append(f"{int((inside | again).sum())} samples of the forgotten classes in the retain data were left out")
    others = retain.subset(torch.nonzero(~(inside | again)).flatten())
    assert others.labels is not None and own.labels is not None
    return Samples(
        load=lambda i: others.load(i) if i < len(others) else own.load(i - len(others)),
        hashes=others.hashes + own.hashes,
        labels=torch.cat([others.labels, own.labels]),
        names=others.names + own.names,
        description=f"{others.description}; forget: {own.description}",
        synthetic=others.synthetic or own.synthetic,
        skipped=others.skipped + own.skipped,
        matched=others.matched and own.matched,
    )


def _fresh(samples: Samples, seen: Samples) -> Samples:
    used = set(seen.hashes)
    return samples.subset(i for i, h in enumerate(samples.hashes) if h not in used)


def _every(samples: Samples, part: int, whole: int) -> Tensor:
    """True for ``part`` of every ``whole`` items of each class, spread over them and the first one among them.

    So either side holds every class in the same share; bool ``(n,)``.
    """
    assert samples.labels is not None
    result = torch.zeros(len(samples), dtype=torch.bool)
    for label in samples.labels.unique():
        places = torch.nonzero(samples.labels == label).flatten()
        steps = -(-torch.arange(len(places) + 1) * part // whole)
        result[places[steps[1:] > steps[:-1]]] = True
    return result
