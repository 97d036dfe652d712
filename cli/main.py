"""The `modhifi` command: its verbs, and the one place where errors become exit codes.

A verb is a function, or a group of them, in a file of its own, which is imported when the verb is called, so that
`modhifi --help` stays quick. It raises ModhifiError for what the user can mend and never prints a traceback.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
import warnings
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from modhifi.artifacts.escape import one_line
from modhifi.errors import ModhifiError, is_out_of_memory

from . import streams
from .common import annotate
from .env import version

# Every verb, its file's name, and the first sentence of its help, which `modhifi --help` shows without that file.
VERBS = {
    "prune": "Make a model physically smaller, without its training data, labels or gradients.",
    "unlearn": "Make a classifier forget classes with forward passes only, then attack the result. "
    "No proof of data deletion.",
    "heal": "Distil the original into a pruned or unlearned model, without labels: "
    "the one verb with gradients to weights.",
    "verify": "Bound how far an edited model's outputs moved: every rung labelled, with a verdict on each tolerance.",
    "audit": "Try to get forgotten classes back: norms re-estimated, probes, neighbours, prototypes; "
    "beside an output mask.",
    "score": "Measure every component and HiFi set: singleton and Subset Fidelity, energy, removal cost and order.",
    "compare": "Prune with many selectors, compensations and budgets on shared moments, and draw the Pareto front.",
    "bench": "Time models side by side in one process: latency by runtime, batch and threads, and memory.",
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
BAD_INPUT, OUR_BUG = 2, 3
# Signals that end a run, and are met as Ctrl-C is: what was begun is taken away, and the exit code is 128 + number.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Ended(KeyboardInterrupt):
    """A signal that ends the run."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class ErrorMapping(TyperGroup):
    """Imports and runs the verb, and turns its exception into one line on stderr and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in ("prune", "recipe") and rest:
            importlib.import_module(".early", __package__).refuse_impossible(name, rest)
        return name, load(name) if name in VERBS else command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here and not at exit, where a full disk could no longer be told
            return result
        except (KeyboardInterrupt, typer.Abort) as error:
            raise _end(error) from None
        except Exception as error:
            if (interrupt := _interrupt(error)) is not None:
                raise _end(interrupt) from None
            message = message_of(error)
            if message is not None:
                _stderr(f"error: {message}")
                annotate("error", message)
                raise typer.Exit(getattr(error, "exit_code", BAD_INPUT)) from None
            if hasattr(error, "exit_code"):
                raise  # typer's own ways to end
            traceback.print_exc()
            _stderr("this is a bug of modhifi; please report it with the lines above and the output of `modhifi env`")
            raise typer.Exit(OUR_BUG) from None


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C behind an error, if one is: extension modules turn one that meets their import into something else."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _end(interrupt: BaseException) -> typer.Exit:
    """Say what ended the run; the exit that says it too."""
    reason = str(interrupt) if isinstance(interrupt, Ended) else "interrupted"
    _stderr("; ".join([reason, *getattr(interrupt, "__notes__", [])]))
    return typer.Exit(getattr(interrupt, "exit_code", 128 + signal.SIGINT))


def _raise_ended(number: int, _: FrameType | None) -> None:
    for other in ENDING[1:]:
        signal.signal(other, signal.SIG_IGN)  # one is enough: what follows would meet the clearing up
    raise Ended(number)


def message_of(error: Exception) -> str | None:
    """The message for an error that is not a bug of ours; None for one that may be."""
    # Names and not classes: importing torch or safetensors here would slow every command down.
    kind, text = type(error).__name__, str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif is_out_of_memory(error):
        text = "out of memory; use fewer samples, or --device cpu for a GPU's"
    elif hasattr(error, "format_message") and kind != "NoArgsIsHelpError":
        text = usage(error)
    elif not isinstance(error, ModhifiError | OSError) and kind != "SafetensorError":
        return None
    return one_line(text)


def usage(error: Any) -> str:
    """The message for options or arguments that a verb does not take, and where its help is."""
    # What pydantic puts before the messages of others.
    text = one_line(error.format_message()).replace("Value error, ", "").removesuffix(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "modhifi"
    return f"{text[:1].lower()}{text[1:]}; see `{command} --help`"


def _stderr(text: str) -> None:
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
    # Read by OpenMP when torch is imported: threads that spin for long while they wait for each other burn the cores
    # that other work on the machine would use, and are themselves held up by it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Read by tqdm when it is imported: bars of transformers, not those of downloads, which decide by themselves.
    os.environ.setdefault("TQDM_DISABLE", "1")
    streams.mend()
    # Torch speaks to those who write programs: nothing that the user of a command could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    for number in ENDING[1:]:  # Python itself turns SIGINT into KeyboardInterrupt
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has one ignored
            signal.signal(number, _raise_ended)
    try:
        app(prog_name="modhifi")
    except SystemExit as end:
        streams.settle()
        if isinstance(end.code, int) and end.code - 128 in ENDING:
            # An interrupt that met C code running Python marks the interpreter to die of the signal, not with our code.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise
