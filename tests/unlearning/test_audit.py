"""The words that are made of an audit's figures."""

from __future__ import annotations

import pytest

from modhifi.unlearning.audit_text import conclude


def row(**values: float) -> dict[str, float | None]:
    return {"forget": 0.9, "retain": 0.9, "recall": 0.9, "probe": 0.9, "neighbours": 0.9, "recall_plain": None} | values


@pytest.mark.parametrize(
    ("edited", "reference", "verdict"),
    [
        (row(), None, "NOT FORGOTTEN"),
        (row(forget=0.0, recall=0.0), None, "SUPPRESSED"),
        (row(forget=0.0, recall=0.5, probe=0.1), None, "PARTLY ERASED"),
        (row(forget=0.0, recall=0.0, probe=0.5), None, "PARTLY ERASED"),
        (row(forget=0.0, recall=0.0, probe=0.2), None, "ERASED FOR A LINEAR READER"),
        (row(forget=0.0, recall=0.0, probe=0.5), row(probe=0.6), "ERASED FOR A LINEAR READER"),
    ],
)
def test_the_verdict_follows_the_figures(edited, reference, verdict: str) -> None:
    rows = {"original": row(), "edited": edited, "head-mask": row(forget=0.0)}
    if reference is not None:
        rows["reference"] = reference
    found, text = conclude(rows, ["cat"])
    assert found == verdict
    assert "no proof of data deletion" in text and "cat" in text
    first = text.partition(". ")[0]
    assert f"{100 * edited['probe']:.1f} %" in first and "90.0 % before" in first
