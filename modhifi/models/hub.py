"""Downloads from the Hugging Face hub at a fixed commit; every failure becomes one line that says what to do."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

from modhifi.errors import ModhifiError

DESCRIPTION = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
# Sub-folders and Mistral's second copy of the weights hold other formats of the same model.
OTHER_FORMATS = ["*/*", "consolidated*"]
# What torch and transformers say of weights that do not fit.
OTHER_SHAPES = re.compile(r"(size mismatch for [\w.]+)|ignore_mismatched_sizes")


def split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """Splits ``ORG/NAME@REVISION`` into name and revision; raises ModhifiError if ``revision`` contradicts it."""
    name, _, suffix = name.partition("@")
    if suffix and revision and suffix != revision:
        raise ModhifiError(f"{name} is pinned to two revisions, {suffix} and {revision}; give one of them")
    return name, suffix or revision


def fetch_description(repo: str, revision: str | None, *, code: bool = False) -> Path:
    """Downloads configuration, tokenizer, processor and card of a hub model, not its weights.

    Returns the folder of the hub's cache, whose name is the resolved commit. ``code`` includes Python files, which
    only a caller that trusts remote code may ask for. A model in the cache is found without a network too.
    Raises ModhifiError for an unknown, private or gated model, an unknown revision, and no network.
    """
    from huggingface_hub import snapshot_download

    patterns = DESCRIPTION + ["*.py"] * code
    with explained(f"hf:{repo}", repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_FORMATS))


def fetch_weights(repo: str, commit: str, gguf_file: str | None = None) -> None:
    """Downloads the weights of a hub model at a commit: one GGUF file, else safetensors, else ``pytorch_model*.bin``.

    Raises ModhifiError if the model has no such file or the download fails.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    with explained(f"hf:{repo}", repo, commit):
        if gguf_file is not None:
            hf_hub_download(repo, gguf_file, revision=commit)
            return
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            folder = snapshot_download(repo, revision=commit, allow_patterns=[pattern], ignore_patterns=OTHER_FORMATS)
            if any(Path(folder).glob(pattern)):
                return
    raise ModhifiError(
        f"hf:{repo} has no safetensors or pytorch_model.bin weights; is another format's name meant "
        "(gguf_file), or another repository?"
    )


def resolve_commit(repo: str, revision: str | None) -> str:
    """The commit, 40 hex digits, to which a revision (default: the main branch) of a hub model resolves now.

    Without a network the cache answers. Raises ModhifiError as ``fetch_description`` does.
    """
    from huggingface_hub import HfApi

    with explained(f"hf:{repo}", repo, revision):
        return str(HfApi().resolve_revision(repo, revision=revision).resolved)


def fetch_licence(repo: str, commit: str) -> str | None:
    """The licence stated in the model card of a hub model at a commit; None without a card or a licence in it."""
    from huggingface_hub import hf_hub_download

    try:
        return card_licence(Path(hf_hub_download(repo, "README.md", revision=commit)))
    except Exception:  # a missing card must never stop a model that loads
        return None


def card_licence(card: Path) -> str | None:
    """The licence in the metadata of a model card (README.md); None if there is none or it cannot be read."""
    from huggingface_hub import metadata_load

    try:
        licence = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except Exception:  # cards are written by hand: a broken one says nothing about the model
        return None
    return None if licence is None else str(licence)


@contextmanager
def explained(subject: str, repo: str | None = None, revision: str | None = None) -> Iterator[None]:
    """Turns every exception of a library inside the block into a ModhifiError of one line about ``subject``."""
    try:
        yield
    except ModhifiError:
        raise
    except Exception as error:
        raise ModhifiError(_line(error, subject, repo or subject, revision)) from error


def _line(error: BaseException, subject: str, repo: str, revision: str | None) -> str:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    chain = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, kinds)), None)

    login = "log in with `hf auth login`"
    if caused_by(hub.GatedRepoError):
        return f"{subject} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then {login} (or set HF_TOKEN)"
    if caused_by(hub.RevisionNotFoundError):
        return f"{subject} has no revision {revision!r}; give a branch, a tag or a full commit"
    if caused_by(hub.RepositoryNotFoundError):
        return f"there is no {subject} on the hub, or it is private; check the name, or {login} if you have access"
    if caused_by(hub.HFValidationError):
        return f"{subject} is not a name the hub can have; write hf:ORG/NAME or hf:ORG/NAME@REVISION"
    if missing := caused_by(hub.RemoteEntryNotFoundError):
        return f"{subject} lacks a file: {first_line(missing, 'Entry Not Found')}"
    refused = caused_by(hub.HfHubHTTPError)
    status = getattr(getattr(refused, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refused access to {subject} ({status}); {login} with an account that may read it"
    if status:
        return f"the hub at {constants.ENDPOINT} answered {status} for {subject}; try again later"
    if caused_by(hub.OfflineModeIsEnabled) and not subject.startswith(("hf:", "timm:")):
        return f"{subject} asks for something from the hub while it is loaded; a directory has to bring all it needs"
    if caused_by(hub.OfflineModeIsEnabled):
        return (
            f"{subject} is not in the cache and HF_HUB_OFFLINE forbids a download; unset it or give a local directory"
        )
    unreachable = [hub.LocalEntryNotFoundError, ConnectionError, TimeoutError, URLError]
    if hasattr(hub, "RevisionResolutionError"):  # huggingface_hub 2 and later
        unreachable.append(hub.RevisionResolutionError)
    # huggingface_hub 1 and later speak through httpx, those before through requests
    if caused_by(*unreachable) or any(type(e).__module__.startswith(("httpx", "requests")) for e in chain):
        return (
            f"cannot reach the hub at {constants.ENDPOINT} and {subject} is not in the cache; check the network "
            "(HF_ENDPOINT names another hub) or give a local directory"
        )
    if caused_by(pickle.UnpicklingError) or any("weights_only" in str(e) for e in chain):
        return f"{subject}: the weight file is a pickle that holds code or is broken; convert it to safetensors"
    if any("trust_remote_code" in str(e) for e in chain):
        return f"{subject} brings its own Python code, which is not run; pass trust_remote_code if you trust it"
    if mismatch := next(filter(None, (OTHER_SHAPES.search(str(e)) for e in chain)), None):
        place = f" ({mismatch[1]})" if mismatch[1] else ""
        return (
            f"cannot load {subject}: the weights have other shapes than the configuration says{place}; a pruned model "
            "needs the modhifi.json that was saved beside it"
        )
    return f"cannot load {subject}: {first_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: Any, containing: str = "") -> str:
    """The first informative line of a library's message, at most 300 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and containing in line]
    line = lines[0] if lines else type(error).__name__
    # "Error(s) in loading state_dict for ResNet:" says nothing without the line that follows it.
    if line.endswith(":") and len(lines) > 1:
        line = f"{line} {lines[1]}"
    return line[:300]


def dataset(spec: str) -> tuple[str, Any]:
    """Loads ``DATASET[:SPLIT]`` (by default the split ``train``): its name and the object of ``datasets.load_dataset``.

    Raises ModhifiError without the `datasets` package or if the data set cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise ModhifiError("hf: needs the datasets package; run: pip install modhifi[datasets]") from error
    name, _, split = spec.partition(":")
    try:
        return name, datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise ModhifiError(
            f"cannot load dataset {name}: {first_line(error)}; check name, split, network and login"
        ) from error
