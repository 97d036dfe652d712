"""What a language model writes before and after an edit, for a reader to compare."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.hub import first_line
from modhifi.models.loaded import LoadedModel

# Texts shown, and the tokens of the beginnings and of what is written on from them.
TEXTS, BEGINNING, WRITTEN = 2, 16, 32


def continuations(original: LoadedModel, edited: nn.Module, held: Samples) -> list[dict[str, str]]:
    """Beginnings of held-out texts and how both models go on, greedily: ``beginning``, ``before`` and ``after``.

    Empty for models that do not write, and where the library's own generation fails for the original. Raises
    ModhifiError where it fails for the edited model alone.
    """
    if original.kind != "text" or original.tokenizer is None or not hasattr(original.model, "generate"):
        return []
    beginnings = next(held.batches(min(TEXTS, len(held))))[:, :BEGINNING]
    if original.real_tokens(beginnings) is not None:
        return []  # padded: the texts are shorter than a beginning
    try:
        before = _write(original.model, beginnings)
    except Exception:  # its own code may raise anything, with no edit to blame
        return []
    try:
        after = _write(edited, beginnings)
    except Exception as error:
        raise ModhifiError(f"the edited model cannot write, and the original can: {first_line(error)}") from error
    texts = zip(beginnings.tolist(), before, after, strict=True)
    names = ("beginning", "before", "after")
    return [
        {name: original.tokenizer.decode(t, skip_special_tokens=True) for name, t in zip(names, parts, strict=True)}
        for parts in texts
    ]


@torch.inference_mode()
def _write(model: nn.Module, beginnings: Tensor) -> list[list[int]]:
    """The tokens that a model writes on from each beginning, up to the end of the text."""
    beginnings = beginnings.to(next(model.parameters()).device)
    end = getattr(model.generation_config, "eos_token_id", None)
    ends = end if isinstance(end, list) else [] if end is None else [end]
    tokens: Tensor = model.generate(  # type: ignore[operator]
        beginnings,
        attention_mask=torch.ones_like(beginnings),
        max_new_tokens=WRITTEN,
        do_sample=False,
        pad_token_id=ends[0] if ends else 0,
    )
    rows = tokens[:, beginnings.shape[1] :].tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
