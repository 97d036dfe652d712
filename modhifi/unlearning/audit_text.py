"""What the figures of an audit say, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# The output forgets where at most this share of the forgotten images is still recognised.
OUTPUT = 0.05
# The features forget a class for a linear reader where the probe finds at most this share of what it found before.
MOSTLY, PARTLY = 1 / 3, 2 / 3
VERDICTS = ("NOT FORGOTTEN", "SUPPRESSED", "PARTLY ERASED", "ERASED FOR A LINEAR READER")
CAVEAT = (
    "This speaks of the attacks listed and of these test images alone; other attacks may find more. Suppression is not "
    "erasure, and a class-unlearned model is no proof of data deletion."
)

Rows = Mapping[str, Mapping[str, float | None]]


def conclude(rows: Rows, names: Sequence[str]) -> tuple[str, str]:
    """A verdict (NOT FORGOTTEN, SUPPRESSED, PARTLY ERASED, ERASED FOR A LINEAR READER) and the reasons, as sentences.

    The first sentence says it all in short.

    With a ``reference`` row the features count as erased where the probe finds no more than on the retrained model.
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
        f"nearest neighbours {_percent(edited, 'neighbours')} (original {_percent(original, 'neighbours')})."
    )
    reference = rows.get("reference")
    if reference is not None:
        parts.append(
            f"On the model retrained without the class the probe finds {_percent(reference, 'probe')}, nearest "
            f"neighbours {_percent(reference, 'neighbours')}."
        )
        erased = _value(edited, "probe") <= _value(reference, "probe")
        left = MOSTLY if erased else _left(edited, original)
    else:
        left = _left(edited, original)
    probed = f"a linear probe finds {_percent(edited, 'probe')} of it there ({_percent(original, 'probe')} before)"
    if not forgets:
        verdict, word = "NOT FORGOTTEN", "neither suppressed at the output nor erased from the features"
    elif left <= MOSTLY and recalled <= OUTPUT:
        verdict = "ERASED FOR A LINEAR READER"
        word = "suppressed at the output and, for a linear reader, mostly erased from the features"
    elif left <= PARTLY:
        verdict, word = "PARTLY ERASED", "suppressed at the output and partly erased from the features"
    else:
        verdict, word = "SUPPRESSED", "suppressed at the output and still held by the features"
    return verdict, " ".join([f"The class is {word}: {probed}.", *parts, CAVEAT])


def _left(edited: Mapping[str, float | None], original: Mapping[str, float | None]) -> float:
    before = _value(original, "probe")
    return _value(edited, "probe") / before if before > 0 else 0.0


def _value(row: Mapping[str, float | None], key: str) -> float:
    value = row.get(key)
    return 0.0 if value is None else value


def _percent(row: Mapping[str, float | None], key: str) -> str:
    value = row.get(key)
    return "(not measured)" if value is None else f"{100 * value:.1f} %"
