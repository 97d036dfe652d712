"""What a causal language model writes its own text from: kinds of beginnings, each showing another side of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi.data.text import cutter_of, vocabulary
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel

# Tokens of a text, roughly. A small model soon loses its thread; many beginnings show it more than a few long texts.
# A chat holds a question and an answer.
TEXT, CHAT = 128, 256
# What a user says in place of everything that a user may say.
MESSAGE = "qZxWvKjY"


@dataclass(frozen=True)
class Beginning:
    """A kind of beginning, in words ``what``.

    Texts of about ``length`` tokens start with one of ``starts``, int64 ``(choices, k)``, of which the first ``hidden``
    tokens are left out; ``front``, int64 ``(m,)``, stands at the front of a window of them.
    """

    name: str
    what: str
    starts: Tensor
    hidden: int = 0
    front: Tensor = torch.zeros(0, dtype=torch.long)
    length: int = TEXT


def beginnings(loaded: LoadedModel) -> list[Beginning]:
    """The kinds that a model has: its own beginning, the user's turn of its chat template, any token at all.

    The user's turn makes an instructed model write a question and answer it (Xu et al., "Magpie", ICLR 2025). Raises
    ModhifiError for a model without any.
    """
    own = _own(loaded)
    if loaded.tokenizer is None:
        return [own]
    chat, tokens = _chat(loaded), plain_tokens(loaded)
    sampled = Beginning("openings", f"one of {len(tokens)} tokens at random", torch.tensor(tokens)[:, None])
    return [own, *([] if chat is None else [chat]), sampled]


def _own(loaded: LoadedModel) -> Beginning:
    """What the tokenizer puts before a text, else the model's token for a beginning, else an ordinary word."""
    if loaded.tokenizer is not None and (frame := cutter_of(loaded, None).frame[0]):
        what = f"the tokenizer's own beginning {frame}"
        return Beginning("beginning", what, torch.tensor([frame]), len(frame), torch.tensor(frame))
    for owner in (loaded.tokenizer, getattr(loaded.model, "generation_config", None), loaded.model.config):
        begin = getattr(owner, "bos_token_id", None)
        if isinstance(begin, int) and 0 <= begin < vocabulary(loaded):
            what = f"the token of the beginning ({begin}), left out"
            return Beginning("beginning", what, torch.tensor([[begin]]), hidden=1)
    words = ordinary_words(loaded)
    return Beginning("beginning", f"one of {len(words)} ordinary words", torch.tensor(words)[:, None])


def _chat(loaded: LoadedModel) -> Beginning | None:
    """The chat template up to what the user says; None without a template that takes a user's message."""
    tokenizer = cutter_of(loaded, None).tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": MESSAGE}], tokenize=False)
    except Exception:  # a template is a program of the model's own, which may refuse anything
        return None
    before, message, _ = str(text).partition(MESSAGE)
    tokens = tokenizer(before, add_special_tokens=False)["input_ids"]
    if not message or not tokens or max(tokens) >= vocabulary(loaded):
        return None
    return Beginning("chat", "the user's turn of the chat template", torch.tensor([tokens]), length=CHAT)


def plain_tokens(loaded: LoadedModel) -> list[int]:
    """The ids of all tokens that are not special."""
    tokenizer = cutter_of(loaded, None).tokenizer
    special = set(tokenizer.all_special_ids)
    return [i for i in range(min(len(tokenizer), vocabulary(loaded))) if i not in special]


def ordinary_words(loaded: LoadedModel) -> list[int]:
    """Token ids that stand for the beginning of a word of two letters or more.

    Raises ModhifiError without a tokenizer, or if its vocabulary has none.
    """
    tokenizer = cutter_of(loaded, None).tokenizer
    ids = range(min(len(tokenizer), vocabulary(loaded)))
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    # Byte-level and sentence-piece vocabularies mark the beginning of a word, WordPiece marks what is none.
    marks = ("Ġ", "▁")
    marked = any(str(piece).startswith(marks) for piece in pieces)
    special = set(tokenizer.all_special_ids)
    words = []
    for i, piece in zip(ids, pieces, strict=True):
        piece = str(piece)
        begins = piece.startswith(marks) if marked else not piece.startswith("##")
        bare = piece.lstrip("".join(marks))
        if begins and i not in special and len(bare) > 1 and bare.isascii() and bare.isalpha():
            words.append(i)
    if not words:
        raise ModhifiError(
            f"the vocabulary of {loaded.source} has neither a token of the beginning nor ordinary words "
            "to start from; give --data text:FILE"
        )
    return words
