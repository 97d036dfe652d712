"""The runtimes that a model is timed in: every one is a file of this package."""

from modhifi.runs.timing.runtimes.base import RUNTIMES, Runtime

__all__ = ["RUNTIMES", "Runtime"]

RUNTIMES.discover(__name__)
