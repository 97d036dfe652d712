"""Bounds carried through one watched pass of the original, an operation at a time."""
