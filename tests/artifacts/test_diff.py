"""`modhifi diff` and `--summary`, on small reports; the shell commands of docs/ci.md as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from modhifi.artifacts.diff import LATENCY, diff_runs
from modhifi.artifacts.summary import junit, markdown, write_summary
from modhifi.cli.main import app
from modhifi.errors import ModhifiError

ROOT = Path(__file__).resolve().parents[2]
runner = CliRunner()

REPORT = {
    "title": "modhifi prune | x",
    "task": "prune",
    "before_after": [{"name": "parameters", "before": 100, "after": 50, "unit": ""}],
    "groups": [{"name": "a", "n": 4, "kept": 2}, {"name": "b", "n": 4, "kept": 4}],
    "settings": {"seed": 0, "method": {"selector": "obs"}},
    "verdicts": [{"name": "max flip", "verdict": "PASS-STATISTICAL", "text": "0.1 < 0.2"}],
    "warnings": ["one <b>"],
    "timing": {"load": 0.5, "prune": 1.0},
}


def reports(directory: Path) -> tuple[Path, Path]:
    other = json.loads(json.dumps(REPORT))
    other["before_after"][0]["after"] = 40
    other["groups"][0]["kept"] = 1
    other["settings"]["method"]["selector"] = "naive"
    other["verdicts"][0]["verdict"] = "FAIL"
    paths = directory / "one.json", directory / "two.json"
    for path, content in zip(paths, (REPORT, other), strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_a_difference_names_every_part(tmp_path: Path) -> None:
    found = diff_runs(*reports(tmp_path))
    assert found["figures"] == [{"name": "parameters", "unit": "", "first": 50, "second": 40, "change": "−20.0 %"}]
    assert found["widths"] == [{"name": "a", "first": 2, "second": 1, "moved": None}]
    assert found["settings"] == [{"name": "method.selector", "first": "obs", "second": "naive"}]
    assert found["verdicts"] == [{"name": "max flip", "first": "PASS-STATISTICAL", "second": "FAIL"}]
    assert found["same_weights"] is None


def test_other_held_out_data_is_told(tmp_path: Path) -> None:
    one, two = reports(tmp_path)
    assert diff_runs(one, two)["held_out"] == []
    for path, words in ((one, "text:[b]"), (two, "self")):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "data": {"held_out": words, "held_out_samples": 5}}))
    assert diff_runs(one, one)["held_out"] == []
    assert diff_runs(one, two)["held_out"] == ["5 of text:[b]", "5 of self"]
    shown = runner.invoke(app, ["diff", str(one), str(two)], env={"COLUMNS": "200"}).output
    assert "the figures are of other held-out data: 5 of text:[b], and 5 of self" in shown


@pytest.mark.parametrize(
    ("first", "second", "change"),
    [
        ({"ratio": 0.8, "spread": 0.03}, {"ratio": 0.6, "spread": 0.02}, "−25.0 ± 3.8 %"),
        ({"ratio": 0.8, "spread": 0.3}, {"ratio": 0.72, "spread": 0.02}, "too noisy to say (0.90 ± 0.34 x)"),
        ({}, {"ratio": 0.6, "spread": 0.02}, "+20.0 %"),  # of an earlier version, 0.01 s over 0.02 s
    ],
)
def test_times_compare_by_the_ratio_to_their_own_originals(
    first: dict[str, float], second: dict[str, float], change: str, tmp_path: Path
) -> None:
    # The second machine is ten times slower: its seconds say nothing.
    times = ({"before": 0.02, "after": 0.01}, {"before": 0.2, "after": 0.12})
    paths = tmp_path / "one.json", tmp_path / "two.json"
    for path, seconds, ratio in zip(paths, times, (first, second), strict=True):
        path.write_text(json.dumps(REPORT | {"before_after": [{"name": LATENCY, "unit": "s", **seconds, **ratio}]}))
    (figure,) = diff_runs(*paths)["figures"]
    assert (figure["first"], figure["second"]) == (first.get("ratio", 0.5), second["ratio"])
    assert (figure["unit"], figure["change"]) == ("x", change)


def test_the_command_prints_it(tmp_path: Path) -> None:
    one, two = map(str, reports(tmp_path))
    shown = runner.invoke(app, ["diff", one, two])
    assert shown.exit_code == 0 and "−20.0 %" in shown.stdout and "naive" in shown.stdout
    assert json.loads(runner.invoke(app, ["diff", one, one, "--json"]).stdout)["settings"] == []


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    one, _ = reports(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    for name, message in (("nothing", "no artefact"), ("broken.json", "not JSON"), ("other.json", "no report")):
        with pytest.raises(ModhifiError, match=message):
            diff_runs(one, tmp_path / name)


def test_junit_counts_what_failed() -> None:
    bad = {**REPORT, "verdicts": [{"name": "n", "verdict": v, "text": "<&"} for v in ("FAIL", "BUG", "VACUOUS")]}
    root = ElementTree.fromstring(junit([("prune", REPORT), ("verify", bad)]))
    assert [(s.get("tests"), s.get("failures"), s.get("errors")) for s in root] == [("1", "0", "0"), ("3", "1", "1")]
    assert root[0].get("time") == "1.500" and root.find(".//failure").get("message") == "FAIL: <&"  # type: ignore[union-attr]


def test_markdown_keeps_its_cells(tmp_path: Path) -> None:
    text = markdown([("prune", REPORT)])
    assert "| ✅ PASS-STATISTICAL | max flip | 0.1 &lt; 0.2 |" in text and "prune \\| x" in text and "−50.0 %" in text
    behind = [{"name": "R1", "verdict": "not available", "text": "no sample was walked"}]
    assert markdown([("prune", REPORT | {"verdicts": [*REPORT["verdicts"], *behind]})]) == text
    write_summary(tmp_path / "s.md", [("prune", REPORT)])
    assert (tmp_path / "s.md").read_text() == text
    with pytest.raises(ModhifiError, match=r"\.xml"):
        write_summary(tmp_path / "s.html", [])


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(encoding="utf-8"), flags=re.S)


def test_the_workflow_is_yaml_and_its_command_is_known() -> None:
    github, gitlab = map(yaml.safe_load, blocks("yaml"))
    commands = [step["run"] for step in github["jobs"]["prune"]["steps"] if "run" in step] + gitlab["prune"]["script"]
    ours = [c for c in commands if c.startswith("modhifi")]
    assert len(ours) == 2
    options = set(re.findall(r"--[a-z]+", " ".join(ours)))
    shown = runner.invoke(app, ["recipe", "run", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    assert options and all(option in shown for option in options)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "code"), [("", 0), (" --set steps.verify.checks.max_flip=0.001", 1)])
def test_the_shell_commands_fail_where_a_verdict_fails(tmp_path: Path, change: str, code: int) -> None:
    (script,) = blocks("sh")
    changed = script.replace("--quiet", f"--quiet{change}")
    command = f'modhifi() {{ "{sys.executable}" -m modhifi "$@"; }}\n{changed}'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == code, done.stderr
    assert (ElementTree.parse(tmp_path / "result.xml").getroot().find(".//failure") is not None) == bool(code)


@pytest.mark.parametrize(
    "part",
    [
        {"title": 3},
        {"groups": [3]},
        {"groups": {"name": "x"}},
        {"groups": [{"name": [], "kept": 1}]},
        {"before_after": [{"after": 1}]},
        {"before_after": [{"name": "x", "after": 10**400}]},
        {"before_after": [{"name": "x", "after": 1, "unit": ["%"]}]},
        {"verdicts": [{"name": "x"}]},
        {"errors": [1]},
    ],
)
def test_a_report_that_is_none_is_one_line(part: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"title": "x"} | part))
    with pytest.raises(ModhifiError, match=r"report\.json is no report of modhifi \(.* restore the file$"):
        diff_runs(path, path)
