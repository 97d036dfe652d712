"""The loaded model: a module with everything that is needed to feed it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.models.chance import drawing_by
from modhifi.models.hooks import module_by_module
from modhifi.models.hub import first_line
from modhifi.models.manifest import Artifact
from modhifi.models.packing import Packing, Unpacked, pack_batch
from modhifi.structure.outputs import classes_last, named_tensors

if TYPE_CHECKING:
    from PIL import Image

    from modhifi.models.listening import Listener
    from modhifi.models.parts import Part

# The token id at the positions of a batch behind the end of a shorter text; in any other integers -1 is a value.
PADDING = -1
# What models of two towers make of each item.
EMBEDDINGS = ("image_embeds", "text_embeds")


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be measured and edited, with everything that is needed to feed it.

    ``model`` is in eval mode, on the CPU when loaded, and none of its parameters requires a gradient. ``source`` is the
    string it was loaded from (``timm:NAME``, ``hf:ORG/NAME``, a directory, ``module:CLASS``), ``framework`` timm,
    transformers or torch. ``kind`` is image (classifier or backbone), text (causal language model), encoder (other
    token models), audio, series (of numbers) or tensor (any module with a given example). ``example`` is a seeded batch
    of 2 model-ready inputs: normalised pixels ``(2, C, H, W)`` or token ids ``(2, 16)``. ``transform`` is the model's
    own evaluation preprocessing, PIL image to float32 ``(C, H, W)``. ``info`` is JSON-able: architecture, arguments,
    resolved commit, licence, versions, notes. ``artifact`` holds the manifest of the artefact that the model was loaded
    from, None for another source. ``values`` says that several outputs are no scores of classes. ``packing`` is the
    form of the items of a model that reads several inputs, whose batches are packed; None for one input.
    """

    model: nn.Module
    source: str
    framework: str
    kind: str
    example: Tensor
    transform: Callable[[Image.Image], Tensor] | None
    tokenizer: Any | None
    labels: tuple[str, ...] | None
    info: dict[str, Any]
    artifact: Artifact | None = None
    packing: Packing | None = None
    # Of models of transformers that read sounds, series or several inputs: what each holds, and how sound is prepared.
    parts: tuple[Part, ...] = ()
    listener: Listener | None = None
    values: bool = False

    @property
    def warnings(self) -> list[str]:
        """What whoever uses the model has to know: weights that were altered, a head that is left out."""
        return list(self.info.get("warnings", []))

    @property
    def is_module(self) -> bool:
        """Whether a Python program held the model: no name loads it again."""
        return self.source.startswith("module:")

    @property
    def draws(self) -> bool | None:
        """Whether its passes draw random numbers in eval mode; None before the first one."""
        return vars(self).get("_draws")

    def logits(self, batch: Tensor, model: nn.Module | None = None) -> Tensor:
        """The main output of one forward pass of ``model`` (default: this model) on a batch, axis 0 the batch.

        Logits where the model has them, otherwise its first output; classes that a 1-d convolution put on axis 1, as
        losses of torch read them, stand behind. The batch moves to the model's device and dtype (:meth:`ready`); token
        ids of ``PADDING`` are masked out of the attention. Raises ModhifiError if the model returns no tensor.
        """
        output = main_output(self._forward(batch, model))
        return output.movedim(1, -1) if output.ndim == 3 and self.classes_first else output

    def outputs(self, batch: Tensor, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Every tensor that one forward pass returns, by its place in the output; "" where there is one alone.

        The batch is treated, and errors are raised, as in :meth:`logits`.
        """
        output = self._forward(batch, model)
        main_output(output)
        return dict(named_tensors(output))

    @torch.no_grad()
    def incomparable(self) -> str:
        """Why the outputs of two models cannot be compared item by item, in words; empty where they can.

        Costs a forward pass of two items, and one of a single item where a list may have an entry for each. Raises
        ModhifiError where the model fails on its example.
        """
        if self.reads_tokens:
            self.require_runs()
            return ""
        two = self.example_of_two()
        try:
            output = self._forward(two, None)
        except Exception:
            self.require_runs()
            raise
        if isinstance(output, list | tuple) and len(output) == 2 and not isinstance(output[0], Tensor):
            if len(self._forward(two[:1], None)) == 1:
                names = ", ".join(dict.fromkeys(name for name, _ in named_tensors(output[0])))
                return f"the model returns a list with one entry an item ({names}), whose sizes are its own"
        main = main_output(output)
        if main.dtype == torch.bool or main.is_complex():
            return f"the model's first output is {str(main.dtype).removeprefix('torch.')}, of which nothing is largest"
        rows = len(main)
        return "" if rows == 2 else f"the model's first output holds {rows} rows for two items"

    @torch.no_grad()
    def require_runs(self) -> None:
        """Raises ModhifiError, in one line, where a forward pass on the example fails."""
        try:
            self._forward(self.example, None)
        except Exception as error:
            forms = {"image": "pixels", "tensor": "its example", "audio": "sound", "series": "a series"}
            given = forms.get(self.kind, "token ids")
            arguments = ", ".join(inspect.signature(self.model.forward).parameters)
            raise ModhifiError(
                f"{self.source}, a {type(self.model).__name__}, does not run on {given} alone "
                f"({first_line(error).partition('tensor(')[0]}); its forward takes {arguments}: from Python, "
                "give items and example= with all that it needs"
            ) from error

    def run(self, batch: Tensor, model: nn.Module | None = None) -> None:
        """Runs a forward pass for its inner activations alone.

        A language model that can restrict its logits computes only those of the last position.
        """
        model = self.model if model is None else model
        self._forward(batch, model, **(last_logits(model) if self.kind == "text" else {}))

    @cached_property
    def classes_first(self) -> bool:
        """Whether the main output, of three axes, is that of a 1-d convolution. Costs a pass where there are any."""
        made: dict[int, torch.Size] = {}
        layers = [m for m in self.model.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
        hooks = [m.register_forward_hook(lambda _, args, y: made.update({y.data_ptr(): y.shape})) for m in layers]
        try:
            with torch.no_grad():
                output = main_output(self._forward(self.example_of_two(), None)) if layers else None
        finally:
            for hook in hooks:
                hook.remove()
        return output is not None and output.ndim == 3 and made.get(output.data_ptr()) == output.shape

    @cached_property
    def gives_values(self) -> bool:
        """Whether the outputs are values, of which the largest names no class and no token: features, or one number.

        Costs a forward pass of two items where neither timm nor the kind tells. What models of transformers call logits
        are scores; several outputs of a module of one's own are, too, unless it was loaded with ``values``.
        """
        if self.kind == "text":
            return False
        if self.framework == "timm":
            return self.values or getattr(self.model, "num_classes", 2) < 2
        if self.values or getattr(getattr(self.model, "config", None), "problem_type", None) == "regression":
            return True
        with torch.no_grad():
            name, output = _main(self._forward(self.example_of_two(), None))
            output = output.movedim(1, -1) if output.ndim == 3 and self.classes_first else output
        # In a tuple outputs have numbers in place of names.
        scores = "logits" in name or (name in ("", "0") and "For" in type(self.model).__name__)
        return classes_last(output).shape[-1] == 1 or (self.framework == "transformers" and not scores)

    @property
    def reads_tokens(self) -> bool:
        """Whether the inputs are token ids, of texts that are padded to one length."""
        return self.kind in ("text", "encoder")

    def real_tokens(self, batch: Tensor) -> Tensor | None:
        """The mask of what is no padding, bool of the batch's shape; None without any and for models without tokens."""
        if self.packing is not None and "attention_mask" in self.packing.names and self.parts:
            mask: Tensor = self.packing.nest(batch)["attention_mask"].bool()
            return None if bool(mask.all()) else mask
        return real_tokens(batch) if self.reads_tokens else None

    def ready(self, batch: Tensor, model: nn.Module) -> Tensor:
        """The batch on the model's device, and numbers in the type of its first parameter.

        What a module of one's own reads may also be in the type of any other parameter, and then stays so.
        """
        parameter = next(model.parameters(), None)
        if parameter is None:
            return batch
        if not batch.is_floating_point():
            return batch.to(parameter.device)
        own = self.kind == "tensor" and any(p.dtype == batch.dtype for p in model.parameters())
        return batch.to(parameter.device, batch.dtype if own else parameter.dtype)

    def example_of_two(self) -> Tensor:
        """Two items of the example, a batch of its own: what the batch axis is shows in the sizes."""
        few = len(self.example) < 2
        return self.example.repeat(2, *[1] * (self.example.ndim - 1)) if few else self.example[:2].clone()

    def of_one_batch(self, model: nn.Module) -> nn.Module:
        """The model as a module that takes a batch of the samples, packed or not."""
        return model if self.packing is None else Unpacked(model, self.packing)

    def of_one_part(self, kind: str, example: Tensor) -> LoadedModel:
        """The model as one that reads an ``example`` of one kind alone, for whatever has samples of that kind."""
        return replace(self, kind=kind, example=example, packing=None, parts=())

    def with_example(self, example: Any) -> LoadedModel:
        """The model with another example: a batch, or a nest of tensors for the several inputs that it reads.

        Raises ModhifiError where a nest holds other things, or tensors of different lengths.
        """
        if isinstance(example, Tensor):
            return replace(self, example=example)
        packing, batch = pack_batch(example)
        return replace(self, example=batch, packing=packing, kind="tensor", transform=None, parts=())

    def _forward(self, batch: Tensor, model: nn.Module | None, **options: Any) -> Any:
        """One forward pass; what it draws in eval mode belongs to the batch, so that models can be compared."""
        model = self.model if model is None else model
        if self.draws is False or model.training:
            return self._plain_forward(batch, model, options)
        device = next((p.device for p in model.parameters()), batch.device)
        with drawing_by(batch, device) as drawn:
            output = self._plain_forward(batch, model, options)
            vars(self)["_draws"] = self.draws or drawn()
        return output

    def _plain_forward(self, batch: Tensor, model: nn.Module, options: dict[str, Any]) -> Any:
        with module_by_module(model):
            return self._call(batch, model, options)

    def _call(self, batch: Tensor, model: nn.Module, options: dict[str, Any]) -> Any:
        batch = self.ready(batch, model)
        if self.kind == "tensor":
            batch = batch.clone()  # code of one's own may change what it is given
        if self.packing is not None:
            return self.of_one_batch(model)(batch)
        if self.kind == "text":
            options["use_cache"] = False  # a key-value cache would hold memory that a single pass never reads
        if (mask := self.real_tokens(batch)) is not None:
            batch, options["attention_mask"] = batch.clamp(min=0), mask.long()
        return model(batch, **options)


def real_tokens(batch: Tensor) -> Tensor | None:
    """The mask of the token ids that are no padding, bool of the batch's shape; None without padding."""
    return None if not batch.numel() or int(batch.min()) >= 0 else batch != PADDING


def last_logits(model: nn.Module) -> dict[str, int]:
    """The option with which a language model computes the logits of the last position alone, if it has one."""
    try:
        arguments = inspect.signature(model.forward).parameters
    except ValueError:  # a function of C++ in its place
        return {}
    return {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}


def main_output(out: Any) -> Tensor:
    """The logits in a model's output, else its first tensor; axis 0 is the batch.

    A single number for each item becomes ``(batch, 1)``. Raises ModhifiError without a tensor for each item.
    """
    return _main(out)[1]


def _main(out: Any) -> tuple[str, Tensor]:
    """The main output behind its name; "" of a tensor alone."""
    logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if isinstance(logits, Tensor):
        return "logits", logits
    if isinstance(out, Mapping) and all(isinstance(out.get(name), Tensor) for name in EMBEDDINGS):
        # Similarities depend on what else is in the batch.
        return EMBEDDINGS[0], torch.cat([out[name] for name in EMBEDDINGS], -1)
    name, first = next(named_tensors(out), ("", None))
    if first is None:
        raise ModhifiError(f"the model returns {type(out).__name__}, not a tensor; wrap it to return one")
    if first.ndim == 0:
        raise ModhifiError("the model returns one number for a whole batch; wrap it to return an output for each item")
    return name, first[:, None] if first.ndim == 1 else first


def frozen(model: nn.Module) -> nn.Module:
    """Sets a model to eval mode, its parameters requiring no gradient, in place; the model itself."""
    return model.eval().requires_grad_(False)


def random_pixels(size: tuple[int, ...]) -> Tensor:
    """A seeded batch of 2 images of normal noise, float32 ``(2, C, H, W)``, as normalised pixels are."""
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
