"""What recipes and the cache of moments do, run as a user would: from a wheel, offline, with a kill in between.

    python eval/recipes.py

Runs every recipe of ci/ from a wheel built of this checkout; then a prune that is killed (SIGKILL) while it measures
and started again, and a second ratio that reuses the moments. Writes results/recipes.json and results/recipes.md.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from common import write_results  # type: ignore[import-not-found]

ROOT = Path(__file__).resolve().parent.parent
# An editable installation of this checkout must not answer in the wheel's place.
START = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'importlib' in getattr(f, '__module__', '')]; "
    "from modhifi.cli.main import main; main()"
)


def wheel(directory: Path) -> Path:
    """An unpacked wheel of this checkout, built from a copy: a build leaves files in its source tree."""
    source = directory / "source"
    for folder in ("modhifi", "cli", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q")
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", directory, source], check=True, cwd=directory)
    (file,) = directory.glob("*.whl")
    zipfile.ZipFile(file).extractall(directory / "installed")
    return directory / "installed"


def start(installed: Path, place: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "MODHIFI_CACHE": str(place / "cache")}
    command = [sys.executable, "-c", START, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=place, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)
    return out


def recipes(installed: Path, place: Path) -> list[dict[str, object]]:
    rows = []
    for file in sorted((installed / "modhifi" / "recipes" / "ci").glob("*.yaml")):
        began = time.perf_counter()
        name = f"ci/{file.stem}"
        out = finish(start(installed, place, "recipe", "run", name, "--out", file.stem, "--json", "--no-cache"))
        seconds = round(time.perf_counter() - began, 1)
        steps = json.loads(out)
        passed = [v["verdict"] for step in steps for v in step["verdicts"] if "PASS" in v["verdict"]]
        said = f"{', '.join(step['step'] for step in steps)}: {', '.join(passed)}"
        rows.append({"what": f"modhifi recipe run {name}", "seconds": seconds, "result": said})
    return rows


def prune(ratio: str, out: str) -> list[str]:
    data = ["--data", "synthetic", "--samples", "256", "--evaluate", "demo:test", "--evaluation-samples", "50"]
    how = ["--rows-per-column", "0", "--walked", "0", "--json"]
    return ["prune", "demo:resnet", "--ratio", ratio, *data, *how, "--out", out]


def resume(installed: Path, place: Path) -> list[dict[str, object]]:
    whole = json.loads(finish(start(installed, place, *prune("0.4", "whole"), "--no-cache")))
    process = start(installed, place, *prune("0.4", "killed"))
    # killed once some but not all of the samples are stored
    while not list(place.glob("cache/moments/*.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (place / "killed").exists():
        raise SystemExit("the kill came too late: the artefact is there")
    resumed = json.loads(finish(start(installed, place, *prune("0.4", "killed"))))
    second = json.loads(finish(start(installed, place, *prune("0.6", "second"))))
    if "the rest measured" not in resumed["data"].get("moments", ""):
        raise SystemExit(f"the kill came too early or too late: {resumed['data']}")
    weights = [json.loads((place / d / "modhifi.json").read_text())["weights"]["files"] for d in ("whole", "killed")]
    same = "weights equal to the uninterrupted run's, byte for byte" if weights[0] == weights[1] else "OTHER WEIGHTS"
    runs = {
        "stage `prune`, uninterrupted, no cache": (whole, ""),
        "the same, killed (SIGKILL) while measuring and started again": (resumed, f"{same}; "),
        "another ratio": (second, ""),
    }
    return [
        {"what": what, "seconds": round(r["timing"]["prune"], 1), "result": said + r["data"].get("moments", "")}
        for what, (r, said) in runs.items()
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        installed = wheel(Path(folder))
        rows = recipes(installed, Path(folder)) + resume(installed, Path(folder))
    write_results(
        "recipes",
        rows,
        ["what", "seconds", "result"],
        """# Recipes and resuming

From a built wheel, offline, on the bundled ResNet. Recipes: wall time of the whole command. Below, the seconds of one
stage, on 256 synthetic images with every position of every image. Command: `python eval/recipes.py`.""",
    )
