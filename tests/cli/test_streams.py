"""Terminals, pipes and closed descriptors of every kind: no traceback, and the exit code of the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Commands, and what a shell does with their streams; one that imports torch, and one that takes a tenth of its time.
ENV = f"{sys.executable} -m modhifi env"
LIST = f"{sys.executable} -m modhifi recipe ls"
FAILS = f"{sys.executable} -m modhifi recipe show none"
# A verb that prints what no other encoding than Unicode's has got.
ARROWS = (
    f'{sys.executable} -c "from modhifi.cli import main; '
    "main.version = lambda name: '0.5\\u00d7 \\u2192 \\u201c\\u00bd\\u201d\\udc80'; "
    "main.sys.argv = ['modhifi', '--version']; main.main()\""
)


def shell(command: str, **settings: str) -> tuple[int, str]:
    """The exit code of a command's first part, and what reached standard error."""
    script = f"{command}\nexit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | settings
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True)
    return done.returncode, done.stderr.decode(errors="replace")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (f"{ENV} | true", 0),
        (f"{LIST} | head -1", 0),
        (f"{sys.executable} -m modhifi --help | true", 0),
        (f"{LIST} | true", 0),
        (f"{LIST} 2>&1 | true", 0),
        (f"{LIST} >&-", 0),
        (f"{LIST} 2>&-", 0),
        (f"{LIST} <&- >&- 2>&-", 0),
        (f"{FAILS} 2>&1 | true", 2),
        (f"{FAILS} >&- 2>&-", 2),
    ],
)
def test_readers_that_go_away_do_not_change_the_exit_code(command: str, code: int) -> None:
    found, stderr = shell(command)
    assert found == code, stderr
    assert "Traceback" not in stderr and "Exception ignored" not in stderr


def test_a_full_disk_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    code, stderr = shell(f"{LIST} > /dev/full")
    assert code == 2 and stderr == "modhifi: error: No space left on device\n"


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "utf-8"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
    ],
)
def test_what_a_terminal_cannot_show_is_replaced(settings: dict[str, str]) -> None:
    code, stderr = shell(ARROWS, **settings)
    assert code == 0 and not stderr
    code, stderr = shell(f"{sys.executable} -m modhifi recipe show $'\\u2192\\x80'", **settings)
    assert code == 2 and stderr.startswith("modhifi: error:") and stderr.count("\n") == 1
