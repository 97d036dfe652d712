"""The refusal of budgets that no model can meet, before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from modhifi.runs.recipes.budgets import BudgetChoice
from modhifi.runs.recipes.bundled import find
from modhifi.runs.recipes.files import Strict, apply_overrides, read_yaml, set_value, validate

FLAGS = {f"--{key.replace('_', '-')}": f"budget.{key}" for key in BudgetChoice.model_fields}
# The options that take the place of a file's budget, as `alternatives` of the recipe says.
REPLACING = {*FLAGS, "--plan", "--eta"}


class Budgeted(Strict, extra="ignore"):
    """The part of a recipe that is looked at here."""

    budget: BudgetChoice = BudgetChoice()


def refuse_impossible(verb: str, arguments: Sequence[str]) -> None:
    """Raises ModhifiError where the options or the recipe of a verb give a share that no model can have."""
    options = list(_options(arguments))
    given = {FLAGS[flag]: value for flag, value in options if flag in FLAGS}
    if verb == "prune":
        names = [value for flag, value in options if flag == "--recipe"]
    else:
        names = [a for a in arguments[1:2] if arguments[0] in ("run", "validate") and not a.startswith("-")]
    path = find(names[-1]) if names else None
    content = {} if path is None else read_yaml(path)
    if any(flag in REPLACING for flag, _ in options):
        content.pop("budget", None)
    for key, value in given.items():
        set_value(content, key, value)
    content = apply_overrides(content, [value for flag, value in options if flag == "--set"])
    flags = {key: flag for flag, key in FLAGS.items() if path is None or key in given}
    steps = content.get("steps")
    for part in (content, *(steps.values() if isinstance(steps, dict) else ())):
        pruning = isinstance(part, dict) and part.get("task", "prune") == "prune"
        if pruning and isinstance(part.get("budget"), dict):
            validate(Budgeted, {"budget": part["budget"]}, path or "the options", flags)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The options among the arguments, each with its value: what follows ``=``, or the next argument."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            yield flag, value if equals else following
