"""The wheel holds the package and nothing beside it, and its command starts quickly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str | Path, cwd: Path, path: Path | None = None) -> str:
    """What the command prints; ``path`` comes before the environment's own packages."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run([*map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging reads: a build leaves files in its source tree."""
    copy = tmp_path_factory.mktemp("source")
    for folder in ("modhifi", "cli", "recipes"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", target, source, cwd=target)
    (file,) = target.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_the_only_top_level_is_modhifi(wheel: Path) -> None:
    tops = {PurePosixPath(name).parts[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"modhifi"}


def test_every_source_and_data_file_is_inside(wheel: Path) -> None:
    inside = {"modhifi": ROOT / "modhifi", "modhifi/cli": ROOT / "cli", "modhifi/recipes": ROOT / "recipes"}
    expected = {
        f"{prefix}/{file.relative_to(folder).as_posix()}"
        for prefix, folder in inside.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    packed = {name for name in names(wheel) if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert packed == expected
    assert "modhifi/cli/main.py" in packed


def test_the_licence_is_inside(wheel: Path) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names(wheel))


def test_the_console_script_resolves_and_answers(installed: Path) -> None:
    (distribution,) = metadata.distributions(name="modhifi", path=[str(installed)])
    (script,) = distribution.entry_points.select(group="console_scripts", name="modhifi")
    call = f"import sys; sys.argv = ['modhifi', '--help']; from {script.module} import {script.attr}; {script.attr}()"
    assert "env" in run(sys.executable, "-c", call, cwd=installed.parent, path=installed)
    module = run(sys.executable, "-m", "modhifi", "--version", cwd=installed.parent, path=installed)
    assert module.split() == ["modhifi", distribution.version]


def test_the_command_imports_nothing_heavy(installed: Path) -> None:
    heavy = ("torch", "numpy", "timm", "transformers", "matplotlib", "PIL", "pydantic")
    call = f"import sys, modhifi.cli.main; print(modhifi.cli.main.__file__, *set(sys.modules) & set({heavy!r}))"
    assert run(sys.executable, "-c", call, cwd=installed.parent, path=installed).split() == [
        str(installed / "modhifi" / "cli" / "main.py")
    ]


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow) for name in ("prune-verify", "sweep", "unlearn-audit")]
)
def test_the_recipes_for_ci_run_from_the_wheel(recipe: str, installed: Path, tmp_path: Path) -> None:
    small = ("prune.data.samples=32", "prune.data.evaluation_samples=32", "verify.data.samples=200")
    options = ["--summary=s.md", *(f"--set=steps.{setting}" for setting in small if recipe == "prune-verify")]
    # An editable installation of this checkout must not answer in the wheel's place.
    call = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'importlib' in getattr(f, '__module__', '')]; "
        f"import modhifi; assert modhifi.__file__.startswith({str(installed)!r}), modhifi.__file__; "
        f"sys.argv = ['modhifi', 'recipe', 'run', 'ci/{recipe}', '--out', 'out', '--quiet', *{options}]; "
        "from modhifi.cli.main import main; main()"
    )
    run(sys.executable, "-c", call, cwd=tmp_path, path=installed)
    assert "❌" not in (tmp_path / "s.md").read_text()
    assert list((tmp_path / "out").glob("*/report.html"))


@pytest.mark.slow
def test_a_wheel_built_from_the_source_distribution_is_the_same(source: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    assert sorted(names(again)) == sorted(names(wheel))
