"""Calibration text that a language model writes itself: no data needed, forward passes only.

A masked language model resamples masked tokens (`resampling`). A causal one writes on from what its tokenizer
puts before every text; where that is nothing, from the model's own token for a beginning; where there is no such token
either, from a random ordinary word. A token of the beginning draws attention from everywhere, so it stands where it
does in real text: the tokenizer's at the front of a window, the model's nowhere. Texts are short and go on past the
model's token for an end; as many as fit are packed into a window, so it is full and nothing is padded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from modhifi.data.resampling import Resampler
from modhifi.data.samples import Samples
from modhifi.data.text import cutter_of, identity, vocabulary, window_of
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.models.trial import failure_told

# The rest of a distribution is thousands of tokens that do not belong, and one of them leads a text astray for good.
NUCLEUS = 0.95
# A text is a loop if less than this share of its runs of so many tokens are different ones.
RUN, LEAST_DIFFERENT = 4, 0.5
# Tokens of a text, roughly. A small model soon loses its thread; many beginnings show it more than a few long texts.
TEXT = 128
# Windows written side by side (of a masked model few, which gives logits at every place), and how many times the number
# wanted may be written before giving up.
BATCH, BATCH_MASKED, ATTEMPTS = 32, 4, 3


@torch.inference_mode()
def write(
    loaded: LoadedModel,
    n: int,
    seed: int = 0,
    window: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Samples:
    """`n` windows of `window` tokens written by ``loaded.model``, of different texts, none of them a loop.

    They depend on the model, the arguments and the settings above alone (and, to rounding, on the device). Raises
    ModhifiError for models that cannot write, and for one that writes nothing but loops.
    """
    if loaded.kind not in ("text", "encoder"):
        raise ModhifiError(
            f"{loaded.source} (kind {loaded.kind}) cannot write text, only a language model can; give "
            "--data images:DIR or synthetic"
        )
    length = window_of(loaded, window)
    chance = torch.Generator().manual_seed(seed)
    writer = Resampler(loaded, length) if loaded.kind == "encoder" else Continuer(loaded, length)
    size = BATCH_MASKED if loaded.kind == "encoder" else BATCH
    by_hash: dict[str, Tensor] = {}
    loops = written = 0
    wanted = n * writer.pieces
    while len(by_hash) < wanted and written < ATTEMPTS * wanted + BATCH:
        progress("writing", len(by_hash) // writer.pieces, n)
        for tokens in writer.write(min(size * writer.pieces, wanted - len(by_hash)), chance):
            written += 1
            if is_loop(tokens):
                loops += 1
            else:
                by_hash.setdefault(identity(tokens), tokens)
    progress("writing", n, n)
    if len(by_hash) < wanted:
        raise ModhifiError(
            f"{loaded.source} writes loops: {loops} of {written} texts repeat themselves; give text "
            "with --data text:FILE"
        )
    texts = list(by_hash.values())
    windows = [writer.window(texts[i : i + writer.pieces]) for i in range(0, wanted, writer.pieces)]
    remarks = [f"self, {n} windows of {length} tokens written from {writer.what}"]
    remarks += [f"{writer.pieces} texts in each"] * (writer.pieces > 1)
    remarks += [f"{writer.how}, seed {seed}"]
    remarks += [f"{loops} loops rejected"] * bool(loops)
    remarks += [f"{written - loops - wanted} duplicates dropped"] * (written - loops > wanted)
    return Samples(
        load=lambda i: windows[i],
        hashes=tuple(identity(tokens) for tokens in windows),
        labels=None,
        names=tuple(f"self {i}" for i in range(n)),
        description=", ".join(remarks),
        synthetic=True,
    )


def is_loop(tokens: Tensor) -> bool:
    """Whether a text, int64 ``(T,)``, repeats itself so much that it is no text."""
    runs = tokens.unfold(0, min(RUN, len(tokens)), 1)
    return len(torch.unique(runs, dim=0)) < LEAST_DIFFERENT * len(runs)


class Continuer:
    """Writes texts on from the model's own beginnings, of which ``pieces`` fill a window of ``length`` tokens."""

    how = f"sampled at temperature 1 from the likeliest {NUCLEUS:.0%}"

    def __init__(self, loaded: LoadedModel, length: int) -> None:
        self.loaded, self.length = loaded, length
        self.starts, self.hidden, self.front, self.what = _starts(loaded)
        own = max(1, length - len(self.front))
        self.pieces = max(1, round(own / TEXT))
        self.text = math.ceil(own / self.pieces)

    def write(self, count: int, chance: torch.Generator) -> Tensor:
        """Texts, int64 ``(count, text)``; the draws are made on the CPU."""
        begin = self.starts[torch.randint(len(self.starts), (count,), generator=chance)]
        return _continue(self.loaded, begin, self.text + self.hidden, chance)[:, self.hidden :]

    def window(self, texts: list[Tensor]) -> Tensor:
        """A window, int64 ``(length,)``, of ``pieces`` texts."""
        return torch.cat([self.front, *texts])[: self.length]


def _starts(loaded: LoadedModel) -> tuple[Tensor, int, Tensor, str]:
    """What a text may start from, int64 ``(choices, k)``, how many of its tokens it leaves out, what stands at the
    front of a window instead, int64 ``(k,)``, and all this in words."""
    nothing = torch.zeros(0, dtype=torch.long)
    if loaded.tokenizer is not None and (frame := cutter_of(loaded, None).frame[0]):
        return torch.tensor([frame]), len(frame), torch.tensor(frame), f"the tokenizer's own beginning {frame}"
    for owner in (loaded.tokenizer, getattr(loaded.model, "generation_config", None), loaded.model.config):
        begin = getattr(owner, "bos_token_id", None)
        if isinstance(begin, int) and 0 <= begin < vocabulary(loaded):
            return torch.tensor([[begin]]), 1, nothing, f"the token of the beginning ({begin}), which is not kept"
    words = ordinary_words(loaded)
    return torch.tensor(words)[:, None], 0, nothing, f"one of {len(words)} ordinary words"


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


def _continue(loaded: LoadedModel, tokens: Tensor, length: int, chance: torch.Generator) -> Tensor:
    """Texts, int64 ``(n, length)``, that start with ``tokens`` ``(n, k)``; the draws are made on the CPU."""
    device = next(loaded.model.parameters()).device
    # transformers has renamed what a model takes and returns as its key-value cache
    cache = "cache" if "cache" in inspect.signature(loaded.model.forward).parameters else "past_key_values"
    past, step = None, tokens.to(device)
    while tokens.shape[1] < length:
        with failure_told(loaded, step, "give text with --data text:FILE"):
            out = loaded.model(input_ids=step, use_cache=True, **{cache: past})
        past = getattr(out, cache, None)
        drawn = draw(out.logits[:, -1], chance)
        tokens = torch.cat([tokens, drawn], 1)
        # A model without such a cache reads everything again.
        step = (tokens if past is None else drawn).to(device)
    return tokens


def draw(logits: Tensor, chance: torch.Generator) -> Tensor:
    """One token for each row of logits ``(n, vocabulary)``, int64 ``(n, 1)``, from the nucleus of the distribution.

    The nucleus holds the likeliest tokens that together have ``NUCLEUS`` of the probability (Holtzman et al., ICLR
    2020).
    """
    shares, order = logits.float().softmax(-1).cpu().sort(-1, descending=True)
    shares[shares.cumsum(-1) - shares >= NUCLEUS] = 0
    return order.gather(-1, torch.multinomial(shares, 1, generator=chance))
