"""What the figures of an audit say, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The output forgets where at most this share of the forgotten images is still recognised.
OUTPUT = 0.05
# The features forget a class for a linear reader where the probe finds at most this share of what it found before.
MOSTLY, PARTLY = 1 / 3, 2 / 3
# The attacks that read features by a linear map.
LINEAR = ("probe", "nearest_mean")
VERDICTS = ("NOT FORGOTTEN", "SUPPRESSED", "PARTLY ERASED", "ERASED FOR A LINEAR READER")
CAVEAT = (
    "This speaks of the attacks listed and of these test images alone; other attacks may find more. Suppression is not "
    "erasure, and a class-unlearned model is no proof of data deletion."
)

Rows = Mapping[str, Mapping[str, float | None]]


def conclude(rows: Rows, names: Sequence[str]) -> tuple[str, str]:
    """A verdict (NOT FORGOTTEN, SUPPRESSED, PARTLY ERASED, ERASED FOR A LINEAR READER) and the reasons, as sentences.

    The first sentence says it all in short.

    With a ``reference`` row the features count as erased where a linear reader finds no more than on the retrained
    model. The nearest class mean is one, too, and often finds more than the probe.
    """
    edited, original = rows["edited"], rows["original"]
    what = ", ".join(names)
    forgets = _value(edited, "forget") <= OUTPUT
    recalled = _value(edited, "recall")
    parts = [
        f"Output: the model recognises {_percent(edited, 'forget')} of the images of {what} "
        f"({_percent(original, 'forget')} before) and {_percent(edited, 'retain')} of the others "
        f"({_percent(original, 'retain')} before)."
    ]
    if edited.get("recall") is not None:
        plain = edited.get("recall_plain")
        unsettled = f", {_percent(edited, 'recall_plain')} before the norms were settled" if plain is not None else ""
        parts.append(
            f"With BatchNorm re-estimated on retained images alone it is {_percent(edited, 'recall')}{unsettled}."
        )
    parts.append(
        f"Features: a linear probe finds {_percent(rows['head-mask'], 'probe')} where the output alone is masked, "
        f"nearest neighbours {_percent(edited, 'neighbours')} (original {_percent(original, 'neighbours')})"
        + (f", the nearest class mean {_percent(edited, 'nearest_mean')}" if "nearest_mean" in edited else "")
        + "."
    )
    reference = rows.get("reference")
    if reference is not None:
        parts.append(
            f"On the model retrained without the class the probe finds {_percent(reference, 'probe')}, nearest "
            f"neighbours {_percent(reference, 'neighbours')}."
        )
    gone = {reader: _is_gone(reader, edited, original, reference) for reader in LINEAR if reader in edited}
    left = MOSTLY if gone.get("probe") else _left(edited, original)
    probed = f"a linear probe finds {_percent(edited, 'probe')} of it there ({_percent(original, 'probe')} before)"
    if not forgets:
        verdict, word = "NOT FORGOTTEN", "neither suppressed at the output nor erased from the features"
    elif all(gone.values()) and recalled <= OUTPUT:
        verdict = "ERASED FOR A LINEAR READER"
        word = "suppressed at the output and, for a linear reader, mostly erased from the features"
    elif left <= PARTLY:
        verdict, word = "PARTLY ERASED", "suppressed at the output and partly erased from the features"
    else:
        verdict, word = "SUPPRESSED", "suppressed at the output and still held by the features"
    return verdict, " ".join([f"The class is {word}: {probed}.", *parts, CAVEAT])


def _is_gone(
    reader: str,
    edited: Mapping[str, float | None],
    original: Mapping[str, float | None],
    reference: Mapping[str, float | None] | None,
) -> bool:
    """Whether a reader of the features finds no more than on the reference, or little of what it found before."""
    found = _value(edited, reader)
    few = reference is not None and reference.get(reader) is not None and found <= _value(reference, reader)
    return few or found <= MOSTLY * _value(original, reader)


def usable_rows(rows: Rows, names: Sequence[str]) -> tuple[Rows, list[str]]:
    """The rows that a verdict may rest on, and a warning where the reference is not among them.

    What recognises the class was not trained without it, and to find no more than on such a model proves nothing.
    """
    reference = rows.get("reference")
    if reference is None or _value(reference, "forget") <= OUTPUT:
        return rows, []
    warning = (
        f"the reference recognises {_percent(reference, 'forget')} of the images of {', '.join(names)}: it was not "
        "trained without the class, so the verdict leaves it out"
    )
    return {name: row for name, row in rows.items() if name != "reference"}, [warning]


def unrecognised(figures: Mapping[str, Any], classes: int) -> list[str]:
    """A warning for each forgotten class that the original does not recognise, and one for the others together.

    ``figures`` are those of an audit. What is right by chance among so many ``classes`` is not recognised, nor is what
    would count as forgotten.
    """
    least = max(1 / classes, OUTPUT)
    remark = "its labels may be in another order than the model's, or the images are not what it was trained on"
    shares = {entry["class"]: entry["original"] for entry in figures["classes"]}
    warnings = [
        f"the original takes only {100 * shares[name]:.1f} % of the images of {name} for that class: {remark}"
        for name in figures["forgotten"]
        if shares.get(name, 1.0) <= least
    ]
    retained = figures["rows"]["original"]["retain"]
    if retained <= least:
        warnings.append(
            f"the original takes only {100 * retained:.1f} % of the images of the other classes for their own: "
            f"{remark.replace('its', 'the', 1)}"
        )
    return warnings


def _left(edited: Mapping[str, float | None], original: Mapping[str, float | None]) -> float:
    before = _value(original, "probe")
    return _value(edited, "probe") / before if before > 0 else 0.0


def _value(row: Mapping[str, float | None], key: str) -> float:
    value = row.get(key)
    return 0.0 if value is None else value


def _percent(row: Mapping[str, float | None], key: str) -> str:
    value = row.get(key)
    return "(not measured)" if value is None else f"{100 * value:.1f} %"
