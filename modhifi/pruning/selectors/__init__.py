"""In which order a group's components go: one file a selector. A new file here is all that a new one takes."""

from __future__ import annotations

from modhifi.pruning.selectors.base import SELECTORS as SELECTORS
from modhifi.pruning.selectors.base import Selector as Selector

SELECTORS.discover(__name__)
