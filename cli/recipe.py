"""`modhifi recipe`: whole runs as YAML files, and those that come with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modhifi.errors import ModhifiError

from .cache import CacheOption, NoCacheOption, cache_directory
from .common import ForceOption, JsonOption, QuietOption, print_json, progress, resolve_device, stdout_console
from .summary import SummaryOption

if TYPE_CHECKING:
    from modhifi.runs.recipe_tasks import Recipe

NameArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, an artefact's directory, or a name of `recipe ls`.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=1", help="Change a value of the recipe; repeat it.")
]

app = typer.Typer(no_args_is_help=True, help="Whole runs as YAML files: list, copy, check and run them.")


@app.command("ls")
def ls(as_json: JsonOption = False) -> None:
    """List the recipes that come with the package."""
    from rich.table import Table

    from modhifi.runs.bundled_recipes import shipped, summary

    found = {name: summary(path) for name, path in shipped().items()}
    if as_json:
        print_json(found)
        return
    table = Table("recipe", "what for", box=None)
    for name, text in found.items():
        table.add_row(name, text)
    stdout_console().print(table)


@app.command("show")
def show(recipe: NameArgument) -> None:
    """Print a recipe."""
    from modhifi.runs.bundled_recipes import find

    typer.echo(find(recipe).read_text(encoding="utf-8"), nl=False)


@app.command("copy")
def copy(
    recipe: NameArgument,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, or a directory.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from modhifi.runs.bundled_recipes import find

    source = find(recipe)
    file = target / source.name if target.is_dir() else target
    if file.exists() and not force:
        raise ModhifiError(f"{file} is there already; give another name, or --force to replace it")
    file.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(str(file))


@app.command("validate")
def validate(recipe: NameArgument, set_values: SetOption = None) -> None:
    """Check a recipe without running it; print it with every default filled in."""
    from modhifi.runs.recipe_file import to_yaml

    typer.echo(to_yaml(read(recipe, set_values).model_dump(mode="json")), nl=False)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from modhifi.runs.recipe_tasks import schema

    print_json(schema())


@app.command("run")
def run(
    recipe: NameArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory to write; of several steps each writes to OUT/NAME.")
    ] = None,
    set_values: SetOption = None,
    summary: SummaryOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Run a recipe: every step in order; exit code 1 where a check fails, after everything is written."""
    import shlex

    from modhifi.artifacts.summary import check_summary, write_summary
    from modhifi.runs.run_recipe import How, run_recipe

    parsed = read(recipe, set_values, out)
    check_summary(summary, parsed.out)
    with progress(quiet or as_json) as report:
        command = shlex.join(["modhifi", *sys.argv[1:]])
        found = run_recipe(parsed, How(resolve_device, force, cache_directory(cache, no_cache), report, command))
    if not found[-1].report:
        return  # the main process of several goes on
    if summary is not None:
        write_summary(summary, [(done.name, done.report) for done in found])
    if as_json:
        print_json([{**done.report, "step": done.name, "path": done.path and str(done.path)} for done in found])
    else:
        for done in found:
            show_report(done.report, done.path)
    failure = found[-1].failure
    if failure is not None:
        raise failure


def read(recipe: str, set_values: list[str] | None, out: Path | None = None) -> Recipe:
    """The recipe of a name or a file, with changes, validated."""
    from modhifi.runs.bundled_recipes import find
    from modhifi.runs.recipe_file import apply_overrides, read_yaml
    from modhifi.runs.recipe_tasks import parse

    path = find(recipe)
    content = apply_overrides(read_yaml(path), set_values or [])
    return parse(content if out is None else {**content, "out": str(out)}, path)


def show_report(report: dict[str, Any], path: Path | None) -> None:
    """A report of any task on one screen."""
    from .prune import show as show_prune
    from .unlearn import show_audit
    from .verify import show_bounds

    if report["task"] == "prune":
        show_prune(report, path)
    elif report["task"] == "verify":
        show_bounds(report["title"], report)
    else:
        show_audit(report, path)
