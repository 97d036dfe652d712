"""The option `--summary`, which the verbs that reach verdicts share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SummaryOption = Annotated[
    Path | None, typer.Option("--summary", help="Also write FILE.md (Markdown) or FILE.xml (JUnit), failed or not.")
]
