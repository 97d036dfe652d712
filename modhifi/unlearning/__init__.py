"""Class unlearning in closed form: populations, moments, methods, edits and the whole run."""
