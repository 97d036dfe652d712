"""GGUF files read once: transformers reads the same file anew for configuration, weights and tokenizer."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# Of the names of a file's fields, those that describe its tokenizer.
VOCABULARY = "tokenizer."


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, a file, the description in it and its table of names are each read once; each of them takes seconds.

    Its reader makes an array of every token and every merge; plain arrays are many times quicker than memory maps, and
    whoever wants the weights goes without them. Does nothing where the package is not installed, which is for
    transformers to say.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    load = reading.load_gguf_checkpoint

    @functools.cache
    def description(path: str) -> Any:
        return load(path, return_tensors=False)

    def load_once(path: Any, return_tensors: bool = False, **others: Any) -> Any:
        described = description(str(path))
        if not return_tensors:
            return _copied(described)
        reader = gguf.GGUFReader(path)
        for name in [name for name in reader.fields if name.startswith(VOCABULARY)]:
            del reader.fields[name]
        return load(path, return_tensors, **others)

    class PlainReader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    own: dict[str, Callable[..., Any]] = {
        "GGUFReader": gguf.GGUFReader,
        "get_tensor_name_map": gguf.get_tensor_name_map,
    }
    once = own | {"GGUFReader": PlainReader}
    vars(reading)["load_gguf_checkpoint"] = load_once
    vars(gguf).update({name: functools.cache(call) for name, call in once.items()})
    try:
        yield
    finally:
        vars(gguf).update(own)
        vars(reading)["load_gguf_checkpoint"] = load


def _copied(description: Any) -> Any:
    """A description whose dictionaries and lists the caller may change; a deep copy would visit every token."""
    if isinstance(description, dict):
        return {name: _copied(entry) for name, entry in description.items()}
    return list(description) if isinstance(description, list) else description
