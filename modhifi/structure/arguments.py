"""Arguments that hold something for each head: a module that has lost heads takes what belongs to those that stay.

ALiBi's slopes are such. A model computes them from its number of heads and hands them to every block, so a block with
fewer heads can neither be given others nor compute its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# An attribute of this name and the argument's holds its axis, how many heads stand there, and which of them stay.
TAKES = "takes_of_"


def with_argument(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is given, with one argument changed, whether it comes by its place or by its name."""
    place = list(inspect.signature(module.forward).parameters).index(name)
    if name in kwargs:
        kwargs = {**kwargs, name: change(kwargs[name])}
    elif place < len(args):
        args = (*args[:place], change(args[place]), *args[place + 1 :])
    return args, kwargs


def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let a module see, of arguments that hold something for each head, only what belongs to heads that it has.

    The heads of every item may stand on one axis, item after item. What is the same for all heads stays as it is.
    """
    for attribute, (dim, heads, *stay) in [(k, v) for k, v in vars(module).items() if k.startswith(TAKES)]:

        def of_those(value: Any, dim: int = dim, heads: int = heads, stay: list[int] = stay) -> Any:
            if not isinstance(value, Tensor) or value.shape[dim] == 1:
                return value
            each = value.unflatten(dim, (-1, heads)).unbind(dim + 1)
            return torch.stack([each[head] for head in stay], dim + 1).flatten(dim, dim + 1)

        args, kwargs = with_argument(module, args, kwargs, attribute.removeprefix(TAKES), of_those)
    return args, kwargs


def take_fewer(module: nn.Module, name: str, dim: int, stay: Tensor) -> None:
    """Let a module take of the argument ``name`` only the heads that ``stay``: bool ``(heads,)`` along axis ``dim``.

    Of a module that takes a part of it already, these are the heads of that part.
    """
    dim, heads, *before = getattr(module, TAKES + name, (dim, len(stay), *range(len(stay))))
    setattr(module, TAKES + name, (dim, heads, *(before[number] for number in stay.nonzero().flatten().tolist())))
    taking(module)


def taking(model: nn.Module) -> nn.Module:
    """The model, in place, whose modules take what their attributes say."""
    for module in model.modules():
        takes = any(attribute.startswith(TAKES) for attribute in vars(module))
        if takes and take not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(take, with_kwargs=True)
    return model
