"""GGUF files read once: transformers reads the same file anew for configuration, weights and tokenizer."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, a file, the description in it and its table of names are each read once; each of them takes seconds.

    Its reader makes an array of every token and every merge; plain arrays are many times quicker than memory maps.
    Does nothing where the package is not installed, which is for transformers to say.
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
        return load(path, return_tensors, **others) if return_tensors else copy.deepcopy(description(str(path)))

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
