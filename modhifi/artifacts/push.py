"""Uploading an artefact to the Hugging Face hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from modhifi.artifacts.model_card import model_card
from modhifi.artifacts.report_file import read_report
from modhifi.errors import ModhifiError
from modhifi.models.hub import explained
from modhifi.models.manifest import read_manifest


def check_push(repo: str) -> None:
    """Raises ModhifiError, before any work, for a name that the hub does not allow and without a login."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    with explained(f"hf:{repo}", repo):
        validate_repo_id(repo)
        if get_token() is None:
            raise ModhifiError("--push-to-hub needs a login: run `hf auth login`, or set HF_TOKEN")
        HfApi().whoami()


def push(directory: Path, repo: str) -> str:
    """Uploads an artefact as a model repository, private if it is new; returns the commit's URL.

    The uploaded card loads the model from the hub. Raises ModhifiError where the hub refuses.
    """
    from huggingface_hub import HfApi

    manifest = read_manifest(directory)
    report = read_report(directory / "report.json")
    api = HfApi()
    with explained(f"hf:{repo}", repo), tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "artefact"
        shutil.copytree(directory, copy)
        (copy / "README.md").write_text(model_card(repo.split("/")[-1], manifest, report, f"hf:{repo}"), "utf-8")
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=copy, commit_message=f"Add a model edited with modhifi {manifest.task}"
        )
    return str(commit.commit_url)
