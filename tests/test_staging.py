"""Replacing a directory: old or new, whole, whatever interrupts it and wherever."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modhifi import staging as module
from modhifi.disk import check_output
from modhifi.errors import ModhifiError
from modhifi.staging import recover, staging

FILES = 20
OLD, NEW = "old", "new"


def write(directory: Path, content: str) -> None:
    """An artefact of many files, each of which says which one it belongs to."""
    (directory / "modhifi.json").write_text(f'{{"written": [], "of": "{content}"}}')
    for number in range(FILES):
        (directory / f"model-{number}.safetensors").write_text(content)


def content(out: Path) -> str:
    """Which of the two stands there; fails where it is a mixture, a part, or nothing."""
    texts = {p.read_text() for p in out.iterdir() if p.name.startswith("model-")}
    assert len(texts) == 1 and len(list(out.iterdir())) == FILES + 1, sorted(p.name for p in out.iterdir())
    return texts.pop()


def old(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    write(out, OLD)
    return out


# The system calls of a replacement, by where the module finds them.
CALLS = "os.rename os.open os.close os.unlink os.rmdir os.scandir shutil.rmtree Path.mkdir Path.iterdir".split()


class Fault:
    """Lets the n-th system call of a replacement do something else, before or after it is made."""

    def __init__(self, number: int, act: Callable[[], None], after: bool) -> None:
        self.number, self.act, self.after, self.count = number, act, after, 0

    def install(self) -> None:
        for name in CALLS:
            owner, leaf = name.split(".")
            where = {"os": module.os, "shutil": module.shutil, "Path": Path}[owner]
            setattr(where, leaf, self.wrapped(getattr(where, leaf)))
        module._exchanged = self.wrapped(module._exchanged)

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            mine = self.count == self.number
            if mine and not self.after:
                self.act()
            result = function(*args, **kwargs)
            if mine and self.after:
                self.act()
            return result

        return call


def replace(out: Path, number: int = 0, kill: bool = False, after: bool = False, atomic: bool = True) -> int:
    """Replace ``out`` in this process with a fault at the n-th call; how many calls were made."""

    def act() -> None:
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.EIO, "input/output error")

    fault = Fault(number, act, after)
    if not atomic:
        module._exchanged = lambda first, second: False
    with staging(out) as fresh:
        write(fresh, NEW)
        fault.install()
    return fault.count


SCRIPT = "import sys; sys.path[:0] = [{path!r}]; import test_staging as t; from pathlib import Path; "


def run(code: str) -> subprocess.CompletedProcess[str]:
    start = SCRIPT.format(path=str(Path(__file__).parent))
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)


@pytest.mark.parametrize("atomic", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kill", [False, True], ids=["error", "kill"])
def test_a_fault_at_every_call_leaves_one_of_the_two(tmp_path: Path, kill: bool, after: bool, atomic: bool) -> None:
    """Every system call of the replacement fails, or is the last one that the process makes."""
    # One process forks for each fault: starting Python anew for each would take minutes.
    code = f"t.every_fault(Path({str(tmp_path)!r}), {kill}, {after}, {atomic})"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > FILES


def every_fault(tmp_path: Path, kill: bool, after: bool, atomic: bool) -> None:
    number = 0
    while True:
        number += 1
        out = old(tmp_path)
        child = os.fork()
        if child == 0:
            try:
                made = replace(out, number, kill, after, atomic)
                os._exit(0 if made < number else 7)
            except ModhifiError:
                os._exit(5)
            except BaseException:
                os._exit(9)
        status = os.waitpid(child, 0)[1]
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        assert code in (0, 5, 7, -signal.SIGKILL), code
        recover(out)
        stands = content(out)
        if code == 5 and not atomic:
            assert stands in (OLD, NEW)
        with staging(out) as fresh:  # whatever was left is cleaned by the next one
            write(fresh, NEW)
        assert content(out) == NEW and [p.name for p in tmp_path.iterdir()] == ["out"], list(tmp_path.iterdir())
        module.shutil.rmtree(out)
        if code == 0:
            print(number)
            return


def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    """A process that replaces a directory again and again is killed: what stands there is whole."""
    chance, seen = random.Random(0), set[str]()
    for _ in range(20):
        out = tmp_path / "out"
        if not out.exists():
            old(tmp_path)
        code = f"t.again_and_again(Path({str(out)!r}))"
        start = SCRIPT.format(path=str(Path(__file__).parent))
        process = subprocess.Popen([sys.executable, "-c", start + code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        seen.add(content(out))
    with staging(out) as fresh:
        write(fresh, NEW)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and content(out) == NEW and len(seen) == 2


def again_and_again(out: Path) -> None:
    print("begun", flush=True)
    while True:
        for text in (NEW, OLD):
            with staging(out) as fresh:
                write(fresh, text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_waits(tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = old(tmp_path), module._exchanged
    arrived: list[str] = []

    def handler(*_: Any) -> None:
        arrived.append(content(out))
        raise KeyboardInterrupt

    def interrupted(first: Path, second: Path) -> bool:
        os.kill(os.getpid(), number)
        return real(first, second)

    before = signal.signal(number, handler)
    monkeypatch.setattr(module, "_exchanged", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), staging(out) as fresh:
            write(fresh, NEW)
    finally:
        signal.signal(number, before)
    assert arrived == [NEW] and content(out) == NEW and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_mount_point_gets_its_old_entries_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = old(tmp_path), os.rename
    (out / "lost+found").mkdir()
    monkeypatch.setattr(module.os.path, "ismount", lambda path: Path(path) == out)

    def stuck(source: Any, to: Any) -> None:
        if Path(source).name == "model-7.safetensors" and Path(source).parent.name == "new":
            raise OSError(errno.EBUSY, "busy")
        real(source, to)

    monkeypatch.setattr(module.os, "rename", stuck)
    with pytest.raises(ModhifiError, match="busy"), staging(out) as fresh:
        write(fresh, NEW)
    (out / "lost+found").rmdir()
    assert content(out) == OLD
    monkeypatch.setattr(module.os, "rename", real)
    with staging(out) as fresh:
        write(fresh, NEW)
    assert content(out) == NEW


@pytest.mark.parametrize("moves", [10, 30], ids=["old ones going", "new ones coming"])
def test_a_killed_change_of_a_mount_point_is_undone(tmp_path: Path, moves: int) -> None:
    out = old(tmp_path)
    code = (
        f"import os; from modhifi import staging as m; out = Path({str(out)!r}); m.os.path.ismount = lambda p: True; "
        "real = os.rename; seen = []; "
        "m.os.rename = lambda a, b: (seen.append(a), real(a, b), len(seen) == MOVES and os.kill(os.getpid(), 9)); "
        "w = m.staging(out); fresh = w.__enter__(); t.write(fresh, t.NEW); w.__exit__(None, None, None)"
    )
    assert run(code.replace("MOVES", str(moves))).returncode == -signal.SIGKILL
    assert 0 < len(list(out.glob("model-*"))) < FILES  # the old ones are aside, some of the new ones have come
    recover(out)
    assert content(out) == OLD


@pytest.mark.parametrize("strange", ["thesis.docx", ".git", "notes.txt", "model.bin", "images", "config.json.bak"])
def test_force_replaces_only_what_modhifi_wrote(tmp_path: Path, strange: str) -> None:
    out = old(tmp_path)
    check_output(out, force=True)
    (out / strange).mkdir() if "." not in strange[1:] else (out / strange).write_text("mine")
    with pytest.raises(ModhifiError, match=f"{strange}', which modhifi did not write"):
        check_output(out, force=True)
    assert (out / strange).exists()


def test_a_directory_without_a_manifest_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModhifiError, match="'config.json', which modhifi did not write"):
        check_output(tmp_path, force=True)


def test_a_run_does_not_replace_what_it_reads(tmp_path: Path) -> None:
    out = old(tmp_path)
    for path in (out, out / "model-1.safetensors"):
        with pytest.raises(ModhifiError, match="which this run reads"):
            check_output(out, force=True, reads=[path])
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ModhifiError, match="which this run reads"):
        check_output(out, force=True, reads=[tmp_path / "link"])
    check_output(out, force=True, reads=[tmp_path / "elsewhere", tmp_path])


def test_reports_and_steps_can_be_replaced(tmp_path: Path) -> None:
    for name in ("report.json", "report.html", "recipe.yaml"):
        (tmp_path / name).write_text("{}")
    check_output(tmp_path, force=True)
    steps = tmp_path / "steps"
    steps.mkdir()
    (steps / "recipe.yaml").write_text("steps: {}")
    (steps / "one").mkdir()
    write(steps / "one", OLD)
    check_output(steps, force=True)
    (steps / "one" / "notes.txt").write_text("mine")
    with pytest.raises(ModhifiError, match="'one', which modhifi did not write"):
        check_output(steps, force=True)


def test_places_that_cannot_be_made_are_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for out, message in (
        (tmp_path / ("x" * 256), "name too long"),
        (Path("/proc/x"), "cannot write to /proc/x"),
        (tmp_path / "link", "dangling link"),
        (tmp_path / "file" / "below", "cannot write to"),
    ):
        with pytest.raises(ModhifiError, match="(?i)" + message):
            check_output(out)
    check_output(tmp_path / "a" / "b" / ("y" * 250))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]
    with staging(tmp_path / ("y" * 250)) as fresh:
        write(fresh, NEW)
    assert content(tmp_path / ("y" * 250)) == NEW
