"""One recipe, one run: load, do, measure, bound, save."""
