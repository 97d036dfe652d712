"""Block Optimal Brain Surgeon: what costs least after least squares goes next, at its exact cost."""

from __future__ import annotations

from modhifi.pruning.selectors.base import SELECTORS, Selector

SELECTORS.register(
    Selector(
        "obs",
        "the least exact cost after least squares, found while removing",
        "Hassibi, Stork 1993 (Optimal Brain Surgeon), by blocks",
        lambda readers, seed: None,
    )
)
