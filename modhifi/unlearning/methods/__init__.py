"""The ways to make a classifier forget: every method is one file of this package."""

from modhifi.unlearning.methods.base import METHODS, Method

__all__ = ["METHODS", "Method"]

METHODS.discover(__name__)
