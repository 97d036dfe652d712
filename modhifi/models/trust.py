"""What a directory may ask for while it is loaded: its own files, and nothing from the network."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from modhifi.disk import read_json
from modhifi.errors import ModhifiError
from modhifi.models.weights import read_config

# The fields of timm's configuration that say where its weights are.
PLACES = frozenset({"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"})
# Arguments that the code of timm's architectures takes and no constructor of theirs names.
UNNAMED = frozenset(
    {"features_only", "feature_cls", "out_indices", "bn_momentum", "bn_eps", "bn_tf", "use_naflex", "head_conv_bias"}
    | {"padding_same", "rope_mixed_mode", "embed_cfg"}
)


def check_directory(directory: Path, source: str, trust_remote_code: bool) -> None:
    """Raises ModhifiError where a directory's own description asks for code, weights or files from elsewhere."""
    for index in sorted(directory.glob("*.index.json")):
        listed_files(index)
    if (directory / "adapter_config.json").is_file():
        raise ModhifiError(f"{source} holds an adapter, not a model; merge it into its model and give the result")
    for part in _mappings(read_config(directory)):
        check_arguments(part.get("model_args"), source)
        named = [name for key in ("architecture", "backbone") for name in _texts(part.get(key)) if ":" in name]
        if named:
            raise ModhifiError(
                f"the configuration of {source} names {named[0]}, which is not in it; name an architecture"
            )
        asked = [value for key, value in part.items() if "implementation" in key]
        kernels = [name for value in asked for name in _texts(value) if "/" in name]
        if kernels and not trust_remote_code:
            raise ModhifiError(
                f"the configuration of {source} asks for the kernel {kernels[0]}, which is code of the hub and is not "
                "run; remove it, or pass trust_remote_code if you trust it"
            )


def check_arguments(arguments: Any, source: str) -> None:
    """Raises ModhifiError for arguments of timm's factory that are not of the architecture, where others wrote them."""
    if isinstance(arguments, Mapping) and (refused := sorted(arguments.keys() - architecture_arguments())):
        raise ModhifiError(
            f"the description of {source} has the argument {refused[0]}, which is of no architecture of timm's; "
            "remove it"
        )


@cache
def architecture_arguments() -> frozenset[str]:
    """The names that constructors of timm's models take: none of them says where weights are."""
    import timm

    modules = {sys.modules[timm.model_entrypoint(name).__module__] for name in timm.list_models()}
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    return UNNAMED.union(*(_parameters(kind) for kind in classes))


def _parameters(kind: type) -> Iterable[str]:
    try:
        return inspect.signature(kind).parameters
    except ValueError:
        return ()  # a class without a signature


def listed_files(index: Path) -> list[str]:
    """The weight files that an index names, sorted; ModhifiError if it is broken or names one outside its directory."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        outside = [name for name in names if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ModhifiError(f"{index} is no index of weight files; restore the file") from error
    if outside:
        raise ModhifiError(f"{index} names '{outside[0]}', which is not a file of this directory; restore the file")
    return names


@contextmanager
def no_network() -> Iterator[None]:
    """The libraries of the hub send no request inside."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """A JSON value's objects, however deep."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield part
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)


def _texts(value: Any) -> list[str]:
    """A text, or those of a table."""
    return [text for text in (value.values() if isinstance(value, Mapping) else [value]) if isinstance(text, str)]
