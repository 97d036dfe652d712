"""The `modhifi` command: its verbs, and the one place where errors become exit codes.

A verb is a function, or a group of them, in a file of its own, which is imported when the verb is called, so that
`modhifi --help` stays quick. It raises ModhifiError for what the user can mend and never prints a traceback.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from modhifi.errors import ModhifiError

from .env import version

# Every verb, its file's name, and the first sentence of its help, which `modhifi --help` shows without that file.
VERBS = {
    "prune": "Make a model physically smaller, without its training data, labels or gradients.",
    "unlearn": "Make a classifier forget classes with forward passes only, then attack the result. "
    "No proof of data deletion.",
    "verify": "Bound how far an edited model's outputs moved: every rung labelled, with a verdict on each tolerance.",
    "audit": "Try to get forgotten classes back: norms re-estimated, probes, neighbours, prototypes; "
    "beside an output mask.",
    "score": "Measure every component: singleton fidelity, energy score, exact removal cost, order of removal.",
    "tasks": "Run tasks of lm-eval (pip install 'modhifi\\[lm-eval]') on a language model before and after its edit.",
    "check": "Say what can be pruned of a model, and what not and why. Exit code 1 if nothing can.",
    "diff": "Compare two artefacts or reports: figures, kept widths, settings, verdicts, "
    "and whether the weights are equal.",
    "demo": "Prune the bundled CIFAR-10 ResNet to half its FLOPs and report what that did; offline, on any CPU.",
    "cache": "Show where moments and drawn images are kept and how large they are, or remove them.",
    "env": "Print versions and hardware, ready to paste into a bug report.",
    "data": "Calibration data: make it, look at it.",
    "recipe": "Whole runs as YAML files: list, copy, check and run them.",
}
BAD_INPUT, OUR_BUG, INTERRUPTED = 2, 3, 130


class ErrorMapping(TyperGroup):
    """Import and run the verb, and turn what it raises into one line on stderr and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in VERBS else command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            # Here and not at exit, where a closed pipe could no longer be caught.
            sys.stdout.flush()
            return result
        except (KeyboardInterrupt, typer.Abort):
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output went away (`modhifi ... | head`): nothing to report, and no one to report it to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except Exception as error:
            if _interrupted(error):
                _say("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            known = one_line(error)
            if known is not None:
                _say(f"error: {known}")
                raise typer.Exit(getattr(error, "exit_code", BAD_INPUT)) from None
            if hasattr(error, "exit_code"):
                # typer's own: usage errors, which it prints itself, and exits.
                raise
            traceback.print_exc()
            _say("this is a bug of modhifi; please report it with the lines above and the output of `modhifi env`")
            raise typer.Exit(OUR_BUG) from None


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: extension modules turn one that meets their import into something else."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: Exception) -> str | None:
    """What to tell the user about an error that is not a bug; None if it may be one."""
    # Names and not classes: importing torch or safetensors here would slow every command down.
    kind, text = type(error).__name__, str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        text = "out of memory; use fewer samples, or --device cpu for a GPU's"
    elif not isinstance(error, ModhifiError | OSError) and kind != "SafetensorError":
        return None
    return " ".join(text.split())


def _say(text: str) -> None:
    print(f"modhifi: {text}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"modhifi {version('modhifi')}")
        raise typer.Exit()


app = typer.Typer(cls=ErrorMapping, name="modhifi", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def options(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say on stderr what is being done: give it before the verb.")
    ] = False,
) -> None:
    """Edit open-weight models with forward passes only: prune, unlearn, verify."""
    if verbose:
        logging.basicConfig(stream=sys.stderr, format="modhifi: %(message)s")
        logging.getLogger("modhifi").setLevel(logging.INFO)


def load(verb: str) -> Any:
    """The command of a verb, from its file."""
    module = importlib.import_module(f".{verb}", __package__)
    if hasattr(module, "app"):
        group = typer.main.get_command(module.app)
        group.name = verb
        return group
    alone = typer.Typer(add_completion=False)
    alone.command(verb)(getattr(module, verb))
    return typer.main.get_command(alone)


for name, text in VERBS.items():
    app.command(name, help=text)(lambda: None)


def main() -> None:
    """The console script."""
    # Read by torch at its first large tensor (Linux): huge pages spare the page faults of fresh activations. Forgetting
    # works on a few wide Grams again and again, which huge pages make slower.
    if sys.argv[1:2] != ["unlearn"]:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app(prog_name="modhifi")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # An interrupt that met C code running Python marks the interpreter to die of the signal, not with our code.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise
