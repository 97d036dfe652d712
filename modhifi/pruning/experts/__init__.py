"""In which order the experts of a mixture go: one file a selector. A new file here is all that a new one takes."""

from __future__ import annotations

from modhifi.pruning.experts.base import EXPERT_SELECTORS as EXPERT_SELECTORS
from modhifi.pruning.experts.base import ExpertSelector as ExpertSelector

EXPERT_SELECTORS.discover(__name__)
