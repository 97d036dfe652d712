"""How a budget is shared out over the groups: one file a layout. A new file here is all that a new one takes."""

from __future__ import annotations

from modhifi.pruning.layouts.base import LAYOUTS as LAYOUTS
from modhifi.pruning.layouts.base import Layout as Layout

LAYOUTS.discover(__name__)
