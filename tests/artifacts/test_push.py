"""Model cards that the hub takes and snippets that run; uploads to a server of our own, only when asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer, Repository
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import modhifi
from modhifi.cli.main import app

runner = CliRunner()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "small-resnet"
    data = {"samples": 16, "evaluate": "demo:test", "evaluation_samples": 20}
    modhifi.prune("demo:resnet", "demo:calibration", ratio=0.2, checks={"walked": 0}, out=out, **data)
    return out


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A hub of our own in place of the real one, in this process too."""
    with HubServer({"someone/taken": Repository()}) as hub:
        import huggingface_hub.constants as constants

        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    return code


def test_the_card_has_the_metadata_of_the_hub_and_its_snippet_runs(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (artefact / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "modhifi" and data["pipeline_tag"] == "image-classification"
    assert data["metrics"] == ["accuracy"] and {"modhifi", "pruned", "timm"} <= set(data["tags"])
    monkeypatch.chdir(artefact)
    names: dict[str, object] = {}
    exec(snippet(text), names)
    assert type(names["model"]).__module__ == "timm.models.resnet"


def test_an_upload_can_be_loaded_from_the_hub(artefact: Path, server: HubServer) -> None:
    from modhifi.artifacts.push import push

    url = push(artefact, "someone/small")
    repository = server.repositories["someone/small"]
    assert repository.private and url.startswith(f"{server.url}/someone/small/commit/")
    (files,) = repository.commits.values()
    assert set(files) == {p.name for p in artefact.iterdir()}
    assert files["model.safetensors"] == (artefact / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert 'modhifi.load("hf:someone/small")' in snippet(card) and '"."' in (artefact / "README.md").read_text()
    names: dict[str, object] = {}
    exec(snippet(card), names)
    ours = modhifi.load(artefact)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(names["model"](x), ours(x))  # type: ignore[operator]


def test_the_command_uploads_only_when_asked_and_only_what_passes(
    server: HubServer, tmp_path: Path, model_dir: Path, image_dir: Path
) -> None:
    common = ["prune", str(model_dir), "--data", f"images:{image_dir}", "--ratio", "0.2", "--samples", "8", "--quiet"]
    common += ["--evaluation-samples", "8", "--walked", "0", "--only", "layer4*"]
    failed = [*common, "--out", str(tmp_path / "a"), "--max-error", "1e-9", "--push-to-hub", "someone/failed"]
    assert runner.invoke(app, failed).exit_code == 1
    assert "someone/failed" not in server.repositories
    done = runner.invoke(app, [*common, "--out", str(tmp_path / "b"), "--push-to-hub", "someone/taken"])
    assert done.exit_code == 0, done.stderr
    assert "uploaded: " in done.stderr and len(server.repositories["someone/taken"].commits) == 1


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (None, "someone/x", "needs a login"),
        ("wrong", "someone/x", "refused access"),
        (TOKEN, "a/b/c", "not a name"),
    ],
)
def test_it_is_refused_before_the_work(
    token: str | None, name: str, message: str, server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    out = tmp_path / "out"
    done = runner.invoke(app, ["prune", "demo:resnet", "--ratio", "0.2", "--out", str(out), "--push-to-hub", name])
    assert done.exit_code == 2 and message in done.stderr and not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "demo:resnet", "--ratio", "0.2", "--dry-run"],
        ["unlearn", "demo:resnet", "--forget", "frog", "--data", "demo:calibration"],
    ],
)
def test_nothing_is_not_uploaded(arguments: list[str], server: HubServer) -> None:
    done = runner.invoke(app, [*arguments, "--push-to-hub", "someone/nothing"])
    assert (
        done.exit_code == 2
        and "this one writes nothing" in done.stderr
        and "someone/nothing" not in server.repositories
    )
