"""The formats that a model is exported to: every one is a file of this package."""

from modhifi.artifacts.exports.base import EXPORTS, ExportFormat

__all__ = ["EXPORTS", "ExportFormat"]

EXPORTS.discover(__name__)
