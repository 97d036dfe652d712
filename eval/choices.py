"""Everything that a run can choose by name, as docs/choices.md lists it: read from the registries.

python eval/choices.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modhifi.artifacts.exports import EXPORTS
from modhifi.data.sources import SOURCES
from modhifi.healing.optimizers import OPTIMIZERS
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.experts import EXPERT_SELECTORS
from modhifi.pruning.layouts import LAYOUTS
from modhifi.pruning.selectors import SELECTORS
from modhifi.pruning.weightings import WEIGHTINGS
from modhifi.registry import Registry
from modhifi.runs.timing.runtimes import RUNTIMES
from modhifi.unlearning.attacks import ATTACKS
from modhifi.unlearning.methods import METHODS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "choices.md"
INTRO = """# What can be chosen

Every choice is one small file that registers itself; a new file adds one ([CONTRIBUTING](../CONTRIBUTING.md)).
This page is what `python eval/choices.py` reads from the registries. "Ours": from no paper. Formulas are in
[method.md](method.md) and [unlearning.md](unlearning.md).
"""
TABLES: tuple[tuple[str, str, Registry[Any]], ...] = (
    ("Data", "`--data`, `--evaluate`: where samples come from.", SOURCES),
    ("Selectors", "`--selector`: which components go first.", SELECTORS),
    ("Compensations", "`--compensate`: what makes up for those that go.", COMPENSATIONS),
    (
        "Selectors of experts",
        "`--experts` with `--expert-selector`: which experts of a mixture go first.",
        EXPERT_SELECTORS,
    ),
    ("Weightings", "`--allocate`: how the errors of different groups compare.", WEIGHTINGS),
    ("Layouts", "`--layout`: how a budget is shared out over the groups.", LAYOUTS),
    ("Unlearning methods", "`modhifi unlearn --method`: how a classifier forgets.", METHODS),
    ("Attacks", "Every audit runs all of them on an edited model.", ATTACKS),
    ("Optimisers", "`modhifi heal --optimizer`: how gradients become steps.", OPTIMIZERS),
    ("Exports", "`--export`: files that hold the model and run without modhifi.", EXPORTS),
    ("Runtimes", "`modhifi bench --runtime`: what runs the model while it is timed.", RUNTIMES),
)


def page() -> str:
    """The whole page in Markdown."""
    return "\n".join([INTRO, *(table(*parts) for parts in TABLES)])


def table(title: str, purpose: str, registry: Registry[Any]) -> str:
    """One registry under its heading: a row an entry."""
    rows = []
    for name, entry in registry.items():
        aliases = [alias for alias, target in registry.aliases.items() if target == name]
        called = f"`{getattr(entry, 'metavar', name)}`" + "".join(f" (`{alias}`)" for alias in aliases)
        file = registry.modules[name].replace(".", "/").removeprefix("modhifi/") + ".py"
        rows.append(f"| {called} | {entry.summary} | [{file}](../modhifi/{file}) | {entry.source} |\n")
    return f"## {title}\n\n{purpose}\n\n| name | what it does | file | source |\n|---|---|---|---|\n{''.join(rows)}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
