from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors import SafetensorError
from typer.testing import CliRunner

from modhifi.cli.common import print_json, progress, wide_table
from modhifi.cli.main import VERBS, ErrorMapping, app
from modhifi.errors import GateFailed, ModhifiError, SelfTestFailed
from modhifi.runs.devices import resolve_device


def raising(error: BaseException) -> Any:
    """What a user sees of a command that raises ``error``."""
    failing = typer.Typer(cls=ErrorMapping, pretty_exceptions_enable=False)
    failing.callback()(lambda: None)

    @failing.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(failing, ["fail"])


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ModhifiError("no such model 'x'; try another"), 2, "error: no such model 'x'; try another"),
        (ModhifiError("two\n  lines"), 2, "error: two lines"),
        (GateFailed("FAIL: 3 flips"), 1, "error: FAIL: 3 flips"),
        (SelfTestFailed("R2 > R1"), 3, "error: R2 > R1"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x"), 2, "error: No space left on device: out/x"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), 2, "error: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "error: Permission denied: /out"),
        (SafetensorError("I/O error: No space left"), 2, "error: I/O error: No space left"),
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), 2, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 2, "error: out of memory"),
        (RuntimeError("could not create a primitive"), 2, "error: out of memory"),  # oneDNN's way to say it
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error: BaseException, code: int, text: str) -> None:
    result = raising(error)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith(f"modhifi: {text}")
    assert result.stderr.count("\n") == 1


def test_a_bug_of_ours_shows_its_traceback() -> None:
    result = raising(ZeroDivisionError("division by zero"))
    assert result.exit_code == 3
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "modhifi env" in result.stderr


def test_exits_stay_what_they_are() -> None:
    assert raising(typer.Exit(0)).exit_code == 0
    assert raising(typer.Exit(1)).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-verb"], "no such command 'no-such-verb'; see `modhifi --help`"),
        (["env", "--jsn"], "no such option: --jsn"),
        (["cache", "--cache"], "option '--cache' requires an argument; see `modhifi"),
        (["prune", "x", "--phase", "b"], "invalid value for '--phase': 'b' is not one of"),
        (["verify", "x"], "--data is missing (held-out data: images:DIR,"),
    ],
)
def test_a_usage_error_is_one_line_too(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments, prog_name="modhifi")
    assert result.exit_code == 2 and result.stderr.startswith(f"modhifi: error: {message}")
    assert result.stderr.count("\n") == 1


def test_a_group_without_a_verb_shows_its_help() -> None:
    result = CliRunner().invoke(app, ["data"])
    assert result.exit_code == 2 and "Usage" in result.output and "error" not in result.stderr


def test_a_wide_table_shows_every_figure_at_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    table = wide_table("group", *(f"figure\n{i}" for i in range(9)), words=("group",), title="title")
    table.add_row("model.layers.29.self_attn.q_proj", *(f"{i}.1234" for i in range(9)))
    Console(width=80).print(table)
    shown = capsys.readouterr().out
    assert all(f"{i}.1234" in shown for i in range(9)) and "…" not in shown
    names = [line.split()[0] for line in shown.splitlines()[5:] if line.strip()]
    assert "".join(names) == "model.layers.29.self_attn.q_proj"


def imported(code: str) -> set[str]:
    """Which packages a fresh interpreter holds after it ran ``code``."""
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_imports_no_torch_and_no_verb_a_library_of_models() -> None:
    libraries = {"timm", "transformers", "torchvision", "accelerate", "huggingface_hub", "matplotlib", "jinja2"}
    front = imported("import modhifi; from modhifi.cli.main import app; app(['--help'], standalone_mode=False)")
    verbs = imported(f"from modhifi.cli import {', '.join(VERBS)}")
    assert not front & {*libraries, "torch"}
    assert not verbs & libraries


def test_a_reader_that_goes_away_is_no_error() -> None:
    # The pipe's reading end is closed before the command prints, as `modhifi recipe ls | true` does.
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "modhifi", "recipe", "ls"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0
    assert "Error" not in done.stderr and "modhifi:" not in done.stderr


def test_env_names_versions_and_hardware() -> None:
    result = CliRunner().invoke(app, ["env", "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    assert facts["device"] in ("cpu", "cuda", "mps")
    assert facts["cores"] >= 1
    text = CliRunner().invoke(app, ["env"]).stdout
    assert [line.split()[0] for line in text.splitlines()] == list(facts)


def test_json_knows_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"bound": float("inf"), "values": (1.5, float("nan")), "n": 3})
    assert json.loads(capsys.readouterr().out) == {"bound": None, "values": [1.5, None], "n": 3}


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ModhifiError, match="cuda"):
        resolve_device("cuda")


def test_auto_leaves_out_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cpu")


def test_auto_prefers_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


@pytest.mark.parametrize(
    ("terminal", "quiet", "drawn"), [(True, False, True), (True, True, False), (False, True, False)]
)
def test_quiet_draws_no_progress(
    terminal: bool, quiet: bool, drawn: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    step: Callable[[str, int, int], None]
    with progress(quiet) as step:
        step("collect", 1, 2)
        step("collect", 2, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("collect" in captured.err) is drawn


@pytest.mark.stage_lines
def test_a_log_gets_a_line_a_stage_and_signs_of_life(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    step: Callable[[str, int, int], None]
    with progress(False) as step:
        step("load", 0, 1)
        step("load", 1, 1)
        step("prune", 0, 1)
        for now[0], done in ((1.0, 1), (29.0, 2), (30.0, 3), (31.0, 4), (60.0, 5)):
            step("  measuring", done, 8)
    lines = ["load", "prune", "measuring: 3 of 8, 14.5 s each, 1 min left", "measuring: 5 of 8, 14.8 s each, 44 s left"]
    assert capsys.readouterr().err.splitlines() == [f"modhifi: {line}" for line in lines]
    monkeypatch.setenv("RANK", "1")
    with progress(False) as step:
        step("load", 0, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("no_color", [False, True])
def test_progress_honours_no_color(
    no_color: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with progress(False) as step:
        step("collect", 2, 2)
    assert (re.search(r"\x1b\[(\d;)?3\d", capsys.readouterr().err) is None) is no_color


def test_progress_shows_rates_and_time_left_on_a_terminal_only(monkeypatch, capsys) -> None:
    from modhifi.cli.common import progress

    with progress(False) as report:
        report("  stage", 1, 2)
    assert "/s" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with progress(False) as report:
        for done in range(5):
            report("outer", 0, 1)
            report("  inner", done, 4)
    shown = capsys.readouterr().err
    assert "outer" in shown and "  inner" in shown and "4/4" in shown and "left" in shown and "/s" in shown
    assert "\x1b[3" not in shown
    with progress(True) as report:
        report("stage", 1, 2)
    assert capsys.readouterr().err == ""


def test_the_shell_can_be_taught() -> None:
    # as the option does once it has found out which shell asks
    shown = CliRunner().invoke(app, prog_name="modhifi", env={"_MODHIFI_COMPLETE": "source_bash"})
    assert shown.exit_code == 0 and "complete" in shown.stdout and "modhifi" in shown.stdout


def test_help_keeps_what_stands_in_brackets() -> None:
    shown = CliRunner().invoke(app, ["prune", "--help"], env={"COLUMNS": "200"}).output
    assert "hf:ORG/NAME[@REVISION]" in shown and "hf:DATASET[:SPLIT]" in shown
    assert "modhifi[lm-eval]" in CliRunner().invoke(app, ["tasks", "--help"], env={"COLUMNS": "200"}).output


def test_garbage_collections_do_not_go_through_the_libraries() -> None:
    code = (
        "import gc\nfrom modhifi.cli.common import imported_for_good\nwith imported_for_good():\n    import numpy\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 10_000, len(gc.get_objects()) < 1_000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True True\n"


def test_an_error_becomes_an_annotation_of_github_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    result = raising(GateFailed("max flip: FAIL: 3 % flip"))
    assert result.stderr.splitlines() == [
        "modhifi: error: max flip: FAIL: 3 % flip",
        "::error title=modhifi::max flip: FAIL: 3 %25 flip",
    ]
    assert result.stdout == ""
