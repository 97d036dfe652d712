"""Code in the directory of a pruned transformer with unequal layers, with which transformers alone loads it.

The code builds the family's own class, takes out the sublayers and narrows the layers as ``config.json`` records. It
needs no modhifi, but ``trust_remote_code=True``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from string import Template
from typing import Any

import transformers

from modhifi.models.from_transformers import class_name
from modhifi.models.manifest import Differences
from modhifi.models.skeleton import FIELD, without_code
from modhifi.structure.arguments import TAKES, take, taking, with_argument

MODULE = "modeling_modhifi"
CODE = Template('''"""$name with the layers and widths that config.json records under "$field"; written by modhifi."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import $name as Stock

TAKES = "$takes"


$functions

class NoBranch(nn.Module):
    """Stands in for a sublayer that was removed: it adds nothing to the stream."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args, **kwargs):
        zero = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).new_zeros(())
        return zero if self.outputs == 1 else (zero, *[None] * (self.outputs - 1))


class $name(Stock):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for name, outputs in config.$field["removed"].items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, NoBranch(outputs))
        for name, shape in config.$field["shapes"].items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            narrow = getattr(module, leaf).detach()[tuple(map(slice, shape))].clone()
            setattr(module, leaf, nn.Parameter(narrow) if leaf in module._parameters else narrow)
        for name, values in config.$field["attributes"].items():
            module = self.get_submodule(name)
            for attribute, value in values.items():
                if attribute.startswith("config."):
                    module.config = copy.copy(module.config)  # other layers share it
                    setattr(module.config, attribute.removeprefix("config."), value)
                else:
                    setattr(module, attribute, tuple(value) if isinstance(value, list) else value)
        taking(self)
''')
# What that code needs of modhifi's own, as it stands there.
FUNCTIONS = "\n\n".join(inspect.getsource(function) for function in (with_argument, take, taking))


def add_code(directory: Path, config: Any, changes: Differences) -> str | None:
    """Writes the code beside the model and names it in ``config``, in place; returns the Auto class that then loads it.

    ``changes`` are those of `skeleton.record`. Returns None, and writes nothing, where they are not only narrower
    layers and removed sublayers of a class of transformers.
    """
    name = config.architectures[0]
    narrower = None not in changes["shapes"].values() and not changes["dtypes"] and all(changes["removed"].values())
    if not narrower or not hasattr(transformers, name):
        return None
    stock = class_name(config)
    auto = stock if stock.startswith("Auto") else "AutoModel"  # a map of code has no other keys
    (directory / f"{MODULE}.py").write_text(
        CODE.substitute(name=name, field=FIELD, functions=FUNCTIONS, takes=TAKES), encoding="utf-8"
    )
    config.auto_map = {auto: f"{MODULE}.{name}"}
    setattr(config, FIELD, {key: changes[key] for key in ("shapes", "attributes", "removed")})
    return auto


def remove_code(directory: Path, config: Any) -> None:
    """Takes back, in place, what :func:`add_code` wrote."""
    (directory / f"{MODULE}.py").unlink()
    without_code(config)
