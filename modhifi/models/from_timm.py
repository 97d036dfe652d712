"""Loading timm's models: by name, from a directory in timm's format, or already built."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.models import get_model_args, get_model_input_config, load_state_dict
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.models import hub
from modhifi.models.loaded import LoadedModel, frozen, random_pixels
from modhifi.models.preprocess import Preprocess
from modhifi.models.standardised import with_plain_weights
from modhifi.models.trust import PLACES

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
MODES = {1: "L", 3: "RGB"}


def from_name(
    name: str, pretrained: bool, args: dict[str, Any], weights: str | Path | None, revision: str | None
) -> LoadedModel:
    """Builds a model of timm's registry, with weights from the hub (at a commit), from a file, or random.

    Raises ModhifiError for a name or tag timm does not know, a model without pretrained weights, and what
    ``hub.explained`` explains.
    """
    name, revision = hub.split_revision(name, revision)
    _require_name(name)
    source = f"timm:{name}"
    with hub.explained(source):
        cfg = timm.get_pretrained_cfg(name)
    downloads = pretrained and weights is None
    repo = cfg.hf_hub_id if cfg is not None and downloads else None
    if downloads and (cfg is None or not cfg.has_weights):
        raise ModhifiError(f"timm has no pretrained weights for {name}; give weights=FILE or ask for random weights")
    if revision and not repo:
        raise ModhifiError(f"{source}: a revision pins weights of the hub, and none are downloaded here")
    commit = hub.resolve_commit(repo, revision) if repo else None
    overlay = {"hf_hub_id": f"{repo}@{commit}"} if repo else None
    model = _build(name, source, downloads, args, repo or name, revision, pretrained_cfg_overlay=overlay)
    if weights is not None:
        _load_file(model, Path(weights))
    loaded = loaded_from(model, source)
    if repo and commit:
        licence = loaded.info["licence"] or hub.fetch_licence(repo, commit)
        loaded.info.update(repository=repo, revision=commit, licence=licence)
    elif not downloads:
        # The registry's tag and licence belong to the published weights, and these are others.
        loaded.info.update(tag=None, licence=None)
        loaded.info["notes"].append(f"weights from {weights}" if weights is not None else "random weights, seed 0")
    return loaded


def from_directory(directory: Path, source: str, pretrained: bool, args: dict[str, Any]) -> LoadedModel:
    """Builds the model that a directory in timm's own format holds (``config.json`` with ``architecture``).

    Raises ModhifiError if timm cannot build it or the weights do not fit.
    """
    loaded = loaded_from(_build(f"local-dir:{directory}", source, pretrained, args, source, None), source)
    loaded.info["licence"] = loaded.info["licence"] or hub.card_licence(directory / "README.md")
    return loaded


def loaded_from(model: nn.Module, source: str) -> LoadedModel:
    """Completes a built timm model with its preprocessing, example, labels and description.

    ``model`` is in eval mode and needs no gradients; ``source`` is the string it was loaded from.
    """
    model = with_plain_weights(model)
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    data = resolve_model_data_config(model)
    size = tuple(get_model_input_config(model)["input_size"])
    data["input_size"], notes = size, []
    if len(data["mean"]) != size[0]:
        # timm averages the colour channels of pretrained stems the same way.
        data["mean"], data["std"] = ((sum(data[k]) / len(data[k]),) * size[0] for k in ("mean", "std"))
    transform = None
    if size[0] in MODES:
        transform = Preprocess(create_transform(**data, is_training=False), MODES[size[0]])
    else:
        notes.append(f"no image transform: the model wants {size[0]} channels")
    # The place of the weights is of no use on another machine, and the labels have a field of their own.
    left_out = PLACES | {"label_names", "label_descriptions"}
    info = {
        "architecture": cfg.get("architecture"),
        "tag": cfg.get("tag"),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "model_args": arguments(model),
        "pretrained_cfg": {k: v for k, v in cfg.items() if k not in left_out} | data,
        "revision": None,
        "licence": cfg.get("license"),
        "libraries": {"torch": torch.__version__, "timm": timm.__version__},
        "notes": notes,
    }
    info = json.loads(json.dumps(info, default=str))
    return LoadedModel(model, source, "timm", "image", random_pixels(size), transform, None, _labels(model, cfg), info)


def arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments of timm's factory that give the model its architecture, JSON-able."""
    args: dict[str, Any] = json.loads(json.dumps(get_model_args(model), default=str))
    return args


def _build(
    name: str, source: str, pretrained: bool, args: dict[str, Any], repo: str, revision: str | None, **more: Any
) -> nn.Module:
    # A fixed seed makes a randomly initialised model, or a new head, the same model in every run.
    with hub.explained(source, repo, revision), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return frozen(timm.create_model(name, pretrained=pretrained, **more, **args))


def _load_file(model: nn.Module, path: Path) -> None:
    if path.suffix not in WEIGHT_FILES:
        raise ModhifiError(f"{path} is not a weight file; give one of {', '.join(WEIGHT_FILES)}")
    if not path.is_file():
        raise ModhifiError(f"there is no weight file {path}")
    with hub.explained(str(path)):
        state = load_state_dict(str(path), weights_only=True)
        floats = {name for name, _ in model.named_parameters()}
        for name, tensor in state.items():
            # Copying integers into float parameters would succeed and lose the scales.
            if name in floats and not tensor.is_floating_point():
                raise ModhifiError(f"{path} is quantised ({name!r} is {tensor.dtype}); give full-precision weights")
        _require_classes(model, state, path)
        model.load_state_dict(state, strict=True)


def _require_classes(model: Any, state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ModhifiError where the weights differ from the model in the number of classes alone."""
    known = {name: tensor.shape for name, tensor in model.state_dict().items()}
    others = {name for name, tensor in state.items() if name in known and tensor.shape != known[name]}
    heads = model.pretrained_cfg.get("classifier") or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        if f"{head}.weight" in others <= {f"{head}.weight", f"{head}.bias"}:
            classes = len(state[f"{head}.weight"])
            raise ModhifiError(
                f"{path} has {classes} classes and {model.pretrained_cfg['architecture']} {model.num_classes}; give "
                f"the model argument num_classes={classes} (--model-arg num_classes={classes})"
            )


def _labels(model: nn.Module, cfg: dict[str, Any]) -> tuple[str, ...] | None:
    classes, names = getattr(model, "num_classes", 0), cfg.get("label_names")
    if isinstance(names, dict):
        names = [names.get(i, names.get(str(i), str(i))) for i in range(classes)]
    if names and len(names) == classes:
        described = cfg.get("label_descriptions") or {}
        return tuple(str(described.get(name, name)) for name in names)
    if subset := infer_imagenet_subset(model):
        return tuple(ImageNetInfo(subset).label_descriptions())
    return None


def _require_name(name: str) -> None:
    if "/" in name or ":" in name:
        raise ModhifiError(f"timm:{name} is not a name of timm's registry; a model of the hub is hf:ORG/NAME")
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        nearest = f"nearest: {', '.join(close)}" if close else "timm.list_models() lists them"
        raise ModhifiError(f"timm has no model {base!r}; {nearest}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        close = difflib.get_close_matches(tag, tags, n=3, cutoff=0.0)
        raise ModhifiError(f"timm has no weights {tag!r} for {base}; nearest: {', '.join(close) or 'none'}")
