"""A trial before the work: does a model run on a batch, and do two passes on it agree?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError, is_out_of_memory
from modhifi.models.hooks import attached
from modhifi.models.hub import first_line
from modhifi.models.loaded import LoadedModel
from modhifi.structure.outputs import difference, named_tensors

# By the kind of model (see LoadedModel): what to do where its forward pass fails.
ADVICE = {
    "image": "give images of the size that it takes",
    "text": "give another --window or other text",
    "encoder": "give another --window or other text",
    "audio": "give sounds of another length",
    "series": "give series of another length",
    "tensor": "give items of the shape and type that its forward takes",
}


@contextmanager
def failure_told(loaded: LoadedModel, batch: Tensor, advice: str = "") -> Iterator[None]:
    """Turns what a model's own code raises on a batch into a ModhifiError of one line that says so."""
    try:
        yield
    except ModhifiError:
        raise
    except Exception as error:  # a model's code may raise anything
        if is_out_of_memory(error):
            raise
        raise ModhifiError(
            f"{loaded.source} fails on a batch of {tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}: "
            f"{type(error).__name__}: {first_line(error)}; {advice or ADVICE[loaded.kind]}"
        ) from error


@torch.no_grad()
def try_pass(loaded: LoadedModel, batch: Tensor) -> dict[str, Tensor]:
    """Every output of one pass. Raises ModhifiError where the model cannot run on the batch."""
    with failure_told(loaded, batch):
        return loaded.outputs(batch)


@torch.no_grad()
def broken_layer(models: Iterable[nn.Module], run: Callable[[], object]) -> str | None:
    """The first layer of some models that reads or computes NaN or infinite values in a pass, in words, or None."""
    events: list[str] = []

    def reads(name: str, _: nn.Module, args: object, named: object) -> None:
        if not events and not _finite((args, named)):
            events.append(f"what its layer '{name}' reads")

    def computes(name: str, _: nn.Module, __: object, output: object) -> None:
        if not events and not _finite(output):
            events.append(f"what its layer '{name}' computes")

    layers = [(name, m) for model in models for name, m in model.named_modules() if not any(True for _ in m.children())]
    before = (m.register_forward_pre_hook(partial(reads, name), with_kwargs=True) for name, m in layers)
    behind = (m.register_forward_hook(partial(computes, name)) for name, m in layers)
    with attached((*before, *behind)):
        run()
    return next(iter(events), None)


def _finite(values: object) -> bool:
    tensors = (tensor for _, tensor in named_tensors(values) if tensor.is_floating_point())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[list[str]]:
    """Puts back what passes inside the block do to a model's buffers; the list that it yields then names those."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    changed: list[str] = []
    yield changed
    for name, buffer in list(model.named_buffers()):
        if name not in before or _same(buffer, before[name]):
            continue
        changed.append(name)
        if buffer.shape == before[name].shape:
            buffer.copy_(before[name])
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, before[name])


@torch.no_grad()
def unrepeatable(loaded: LoadedModel, batch: Tensor) -> str | None:
    """How two passes of a model on one batch differ, in a sentence; None where they do not, up to rounding.

    Where it draws at random they differ but for the draws that belong to a batch, which the sentence says. Its buffers
    are as they were afterwards. Raises ModhifiError as :func:`try_pass` does.
    """
    with buffers_restored(loaded.model) as changed:
        first = {name: output.clone() for name, output in try_pass(loaded, batch).items()}
        second = try_pass(loaded, batch)
    wrong = next((name for name, output in first.items() if not _agree(output, second.get(name), not changed)), None)
    if wrong is None and first.keys() == second.keys():
        return (
            f"{loaded.source} draws at random as it runs: figures hold for one draw a batch" if loaded.draws else None
        )
    where = f" in output '{wrong}'" if wrong else ""
    cause = (
        f"its buffer '{changed[0]}' changes at every pass"
        if changed
        else "it keeps something from pass to pass, or draws at random where torch cannot be told what to draw"
    )
    return f"two passes of {loaded.source} on one batch differ{where}: {cause}; figures hold for one pass only"


@torch.no_grad()
def one_of_several(loaded: LoadedModel, batch: Tensor) -> str | None:
    """A sentence where a module of one's own returns several tensors, of which one alone is looked at."""
    if loaded.framework != "torch":
        return None
    with buffers_restored(loaded.model):
        names = list(try_pass(loaded, batch))
    if len(names) < 2:
        return None
    main = "logits" if "logits" in names else names[0]
    return (
        f"{loaded.source} returns {len(names)} tensors, and what is planned, measured and bounded is '{main}' alone; "
        "wrap it to return one tensor with all that matters"
    )


def _same(buffer: Tensor, before: Tensor) -> bool:
    return buffer.shape == before.shape and bool(((buffer == before) | (buffer.isnan() & before.isnan())).all())


def _agree(output: Tensor, other: Tensor | None, rounded: bool) -> bool:
    """To the bit, or up to the order in which a GPU adds: half of the digits of a type, 1 % for half precision."""
    if other is None or output.shape != other.shape:
        return False
    if torch.equal(output, other):
        return True
    inexact = rounded and (output.is_floating_point() or output.is_complex())
    return difference(other, output) <= (min(torch.finfo(output.dtype).eps ** 0.5, 0.01) if inexact else 0.0)
