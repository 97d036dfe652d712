"""What makes up for the removed components: one file a compensation. A new file here is all that a new one takes."""

from __future__ import annotations

from modhifi.pruning.compensations.base import COMPENSATIONS as COMPENSATIONS
from modhifi.pruning.compensations.base import Compensation as Compensation

COMPENSATIONS.discover(__name__)
