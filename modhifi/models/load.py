"""Loading a model from timm, transformers, a local directory or Python as one frozen ``LoadedModel``.

Nothing here unpickles code, and no code of a model's author runs unless ``trust_remote_code`` says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from modhifi.disk import home_path
from modhifi.errors import ModhifiError
from modhifi.models import hub
from modhifi.models.demo import MODELS, bundled
from modhifi.models.from_module import from_module
from modhifi.models.gguf_file import read_once
from modhifi.models.loaded import LoadedModel
from modhifi.models.trust import check_directory, no_network
from modhifi.models.weights import check_weights, read_config, refuse_quantised_config, refuse_quantised_files

DESCRIPTIONS = ("config.json", "modhifi.json")


def load_model(
    spec: str | Path | nn.Module,
    *,
    pretrained: bool = True,
    model_args: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    example: Any = None,
    gguf_file: str | None = None,
    values: bool = False,
) -> LoadedModel:
    """Loads a model from timm, the Hugging Face hub, a local directory or a module.

    The source is ``timm:NAME``, ``hf:ORG/NAME[@REVISION]``, a directory in the format of timm, transformers or modhifi,
    ``demo:resnet``, which comes with the package, or a module.
    ``pretrained=False`` gives random weights from a fixed seed. ``model_args`` reach ``timm.create_model``, and
    ``weights`` is a ``.safetensors`` or ``.pth`` file for ``timm:NAME``. ``gguf_file`` names a GGUF file of the model,
    which is dequantised. ``example`` (batch first) replaces the random example and is required for a module that is
    neither timm's nor transformers'; of a model that reads several inputs it is a tuple of batches, by position, or a
    mapping, by name. A module is copied: the caller's own stays as it is. ``values`` says that several outputs are no
    scores of classes but numbers of their own, as a regression's.

    Raises ModhifiError for an unknown name, a model that cannot be downloaded, one that is already quantised and one
    with NaN or infinite weights.
    """
    name, args = "" if isinstance(spec, nn.Module) else str(spec), dict(model_args or {})
    if weights is not None and not name.startswith("timm:"):
        raise ModhifiError("a weight file does not say its architecture; give timm:NAME with weights=FILE")
    if revision and not name.startswith(("timm:", "hf:")):
        raise ModhifiError("a revision pins a model of the hub; give it with hf:ORG/NAME or timm:NAME")
    if gguf_file and (not name or name.startswith("timm:")):
        raise ModhifiError("a GGUF file holds a language model; give it with hf:ORG/NAME or a directory")

    if isinstance(spec, nn.Module):
        loaded = from_module(spec, args, example)
    elif name.startswith("timm:"):
        from modhifi.models import from_timm

        loaded = from_timm.from_name(name.removeprefix("timm:"), pretrained, args, weights, revision)
    elif name.startswith("hf:"):
        repo, revision = hub.split_revision(name.removeprefix("hf:"), revision)
        directory = hub.fetch_description(repo, revision, code=trust_remote_code)
        refuse_quantised_config(directory, f"hf:{repo}")
        if gguf_file or (pretrained and any((directory / f).is_file() for f in DESCRIPTIONS)):
            hub.fetch_weights(repo, directory.name, gguf_file)
        loaded = _from_directory(directory, f"hf:{repo}", pretrained, args, trust_remote_code, gguf_file)
        loaded = replace(loaded, info=loaded.info | {"repository": repo, "revision": directory.name})
    elif name.startswith("demo:"):
        loaded = _from_directory(bundled(name, MODELS), name, pretrained, args, trust_remote_code, gguf_file)
    else:
        directory = home_path(name)
        if directory.suffix == ".gguf" and directory.is_file():
            directory, gguf_file = directory.parent, directory.name
        _require_directory(directory)
        gguf_file = _gguf_in(directory, gguf_file)
        loaded = _from_directory(directory, name, pretrained, args, trust_remote_code, gguf_file)
    check_weights(loaded.model, loaded.source)
    if values and loaded.kind == "text":
        raise ModhifiError(f"{loaded.source} is a language model, whose outputs are scores of tokens; leave out values")
    loaded = replace(loaded, values=True) if values else loaded
    return loaded if example is None else loaded.with_example(example)


def _from_directory(
    directory: Path, source: str, pretrained: bool, args: dict[str, Any], trust_remote_code: bool, gguf_file: str | None
) -> LoadedModel:
    if (directory / "modhifi.json").is_file():
        from modhifi.models.artifact import load_artifact

        return load_artifact(directory)
    config = read_config(directory)
    check_directory(directory, source, trust_remote_code)
    refuse_quantised_config(directory, source)
    if pretrained and not gguf_file:
        refuse_quantised_files(directory, source)
    local = not source.startswith("hf:") and not trust_remote_code
    once = read_once() if gguf_file else nullcontext()
    with hub.explained(source), no_network() if local else nullcontext(), once:
        if "architecture" in config and not gguf_file:
            from modhifi.models import from_timm

            return from_timm.from_directory(directory, source, pretrained, args)
        if "model_type" in config or gguf_file:
            from modhifi.models import from_transformers

            if args:
                raise ModhifiError(
                    f"model arguments are for timm's models; {source} takes its shape from its config.json"
                )
            return from_transformers.from_directory(directory, source, pretrained, trust_remote_code, gguf_file)
    raise ModhifiError(
        f"{source} is not a model that can be loaded: it needs a config.json in timm's or transformers' format "
        "or a modhifi.json"
    )


def _gguf_in(directory: Path, gguf_file: str | None) -> str | None:
    """The GGUF file to read from a directory, if one is meant; raises ModhifiError where the named one is not there."""
    present = sorted(path.name for path in directory.glob("*.gguf"))
    if gguf_file is not None and not (directory / gguf_file).is_file():
        found = f"it has {', '.join(present)}" if present else "give the file's name or path"
        raise ModhifiError(f"there is no GGUF file {gguf_file} in {directory}; {found}")
    if gguf_file is None and present and not any((directory / name).is_file() for name in DESCRIPTIONS):
        raise ModhifiError(f"{directory} holds a model as GGUF; give the file, {directory / present[0]}")
    return gguf_file


def _require_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    if directory.is_file():
        hint = "give its directory" if (directory.parent / "config.json").is_file() else "give timm:NAME with --weights"
        raise ModhifiError(f"{directory} is a file and does not say its architecture; {hint}")
    import timm

    hint = "give timm:NAME, hf:ORG/NAME or a directory"
    if timm.is_model(directory.name.split(".")[0]):
        hint = f"is timm:{directory.name} meant?"
    elif str(directory).count("/") == 1 and not directory.is_absolute():
        hint = f"is hf:{directory} meant?"
    elif close := difflib.get_close_matches(str(directory), timm.list_models(), n=1, cutoff=0.8):
        hint = f"is timm:{close[0]} meant?"
    noun = "file" if directory.suffix in (".gguf", ".safetensors") else "directory"
    raise ModhifiError(f"there is no {noun} {directory}; {hint}")
