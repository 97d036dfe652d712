"""`modhifi recipe`: whole runs as YAML files, and those that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modhifi.errors import ModhifiError

from .common import CacheOption, ForceOption, JsonOption, NoCacheOption, QuietOption, print_json, stdout_console

if TYPE_CHECKING:
    from modhifi.runs.recipes.tasks import Recipe

NameArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, an artefact's directory, or a name of `recipe ls`.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=1", help="Change a value of the recipe; repeat it.")
]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Whole runs as YAML files: list, copy, check and run them."
)


@app.command("ls")
def ls(as_json: JsonOption = False) -> None:
    """List the recipes that come with the package."""
    from rich.table import Table

    from modhifi.runs.recipes.bundled import shipped, summary

    purposes = {name: summary(path) for name, path in shipped().items()}
    if as_json:
        print_json(purposes)
        return
    table = Table("recipe", "what for", box=None)
    for name, purpose in purposes.items():
        table.add_row(name, purpose)
    stdout_console().print(table)


@app.command("show")
def show(recipe: NameArgument) -> None:
    """Print a recipe."""
    from modhifi.runs.recipes.bundled import find

    typer.echo(find(recipe).read_text(encoding="utf-8"), nl=False)


@app.command("copy")
def copy(
    recipe: NameArgument,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, or a directory.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from modhifi.runs.recipes.bundled import find

    source = find(recipe)
    file = target / source.name if target.is_dir() else target
    if file.exists() and not force:
        raise ModhifiError(f"{file} is there already; give another name, or --force to replace it")
    file.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(str(file))


@app.command("validate")
def validate(recipe: NameArgument, set_values: SetOption = None) -> None:
    """Check a recipe without running it; print it with every default filled in."""
    from modhifi.runs.recipes.files import to_yaml

    typer.echo(to_yaml(read(recipe, set_values).model_dump(mode="json")), nl=False)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from modhifi.runs.recipes.tasks import schema

    print_json(schema())


@app.command("run")
def run(
    recipe: NameArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory to write; of several steps each writes to OUT/NAME.")
    ] = None,
    set_values: SetOption = None,
    summary: Annotated[
        Path | None,
        typer.Option("--summary", help="Also write FILE.md (Markdown) or FILE.xml (JUnit), failed or not."),
    ] = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Run a recipe: every step in order; exit code 1 where a check fails, after everything is written."""
    from modhifi.runs.recipes.bundled import find

    from .run import run

    parsed = read(recipe, set_values, out, summary)
    run(parsed, quiet=quiet, as_json=as_json, force=force, cache=cache, no_cache=no_cache, file=find(recipe))


def read(recipe: str, set_values: list[str] | None, out: Path | None = None, summary: Path | None = None) -> Recipe:
    """Reads the recipe of a name or a file, applies the changes and validates it."""
    from modhifi.runs.recipes.bundled import find
    from modhifi.runs.recipes.files import apply_overrides, read_yaml, set_flags, set_out
    from modhifi.runs.recipes.tasks import parse

    path = find(recipe)
    content = apply_overrides(read_yaml(path), set_values or [])
    if out is not None:
        set_out(content, str(out))
    if summary is not None:
        content["summary"] = str(summary)
    return parse(content, path, set_flags(set_values or []))
