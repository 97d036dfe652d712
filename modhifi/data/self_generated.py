"""Calibration text that a language model writes itself: no data needed, forward passes only.

A masked language model resamples masked tokens (`resampling`). A causal one writes on from several kinds of beginnings
(`beginnings`), each of which gives as many windows as the others. A token of the beginning draws attention from
everywhere, so it stands where it does in real text: the tokenizer's at the front of a window, the model's nowhere.
Texts are short and go on past the model's token for an end; as many as fit are packed into a window, so it is full and
nothing is padded.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from modhifi.cache import Cache
from modhifi.data.beginnings import CHAT, TEXT, Beginning, beginnings
from modhifi.data.resampling import Resampler
from modhifi.data.samples import Samples
from modhifi.data.text import identity, window_of
from modhifi.errors import ModhifiError
from modhifi.models.fingerprint import fingerprint
from modhifi.models.loaded import LoadedModel
from modhifi.models.trial import failure_told

# The rest of a distribution is thousands of tokens that do not belong, and one of them leads a text astray for good.
NUCLEUS = 0.95
# So many tokens are sorted first: all of a vocabulary take half as long as a pass of a small model.
LIKELIEST = 4096
# A text is a loop if less than this share of its runs of so many tokens are different ones.
RUN, LEAST_DIFFERENT = 4, 0.5
# Windows written side by side, and how many times the number
# wanted may be written before giving up.
BATCH, ATTEMPTS = 32, 3
# Raised whenever the same settings would write other windows.
VERSION = 3
Told = Callable[[str, int, int], None]


def write(
    loaded: LoadedModel,
    n: int,
    seed: int = 0,
    window: int | None = None,
    progress: Told = lambda stage, done, total: None,
    cache: Path | None = None,
) -> Samples:
    """`n` windows of `window` tokens written by ``loaded.model``, of different texts, none of them a loop.

    They depend on the model, the arguments and the settings above alone (and, to rounding, on the device), and are kept
    in ``cache`` under a hash of these, if given. The kinds of beginnings take turns; one that gives nothing but loops
    leaves its turns to the others. Raises ModhifiError for models that cannot write, and for one that writes nothing
    but loops.
    """
    if loaded.kind not in ("text", "encoder"):
        raise ModhifiError(
            f"{loaded.source} (kind {loaded.kind}) cannot write text, only a language model can; give "
            "--data images:DIR or synthetic"
        )
    length = window_of(loaded, window)
    name, store, kept = "", None if cache is None else Cache(cache), None
    if store is not None:
        settings = (VERSION, n, seed, length, NUCLEUS, RUN, LEAST_DIFFERENT, TEXT, CHAT, BATCH, ATTEMPTS)
        key = f"{fingerprint(loaded, {})} {settings} {getattr(loaded.tokenizer, 'chat_template', None)}"
        name = f"written-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        kept = store.read(name)
    if kept is None:
        windows, facts = _written(loaded, n, seed, length, progress)
        if store is not None:
            store.write(name, {"windows": windows}, facts)
    else:
        windows, facts = kept[0]["windows"], kept[1]
    return Samples(
        load=lambda i: windows[i],
        hashes=tuple(identity(tokens) for tokens in windows),
        labels=None,
        names=tuple(f"self {i}, {kind}" for i, kind in enumerate(facts["kinds"].split(","))),
        description=facts["description"],
        synthetic=True,
    )


@torch.inference_mode()
def _written(loaded: LoadedModel, n: int, seed: int, length: int, progress: Told) -> tuple[Tensor, dict[str, str]]:
    """Windows, int64 ``(n, length)``, and as texts the kind of each and what they are in words."""
    writers: list[Resampler | Continuer] = (
        [Resampler(loaded, length)]
        if loaded.kind == "encoder"
        else [Continuer(loaded, length, beginning) for beginning in beginnings(loaded)]
    )
    scripts = [Script(writer, seed, number) for number, writer in enumerate(writers)]
    able = scripts
    while True:
        shares = [n // len(able) + (number < n % len(able)) for number in range(len(able))]
        filled = [script.fill(share, progress) for script, share in zip(able, shares, strict=True)]
        if all(filled):
            break
        able = [script for script, full in zip(able, filled, strict=True) if full]
        if not able:
            loops, written = (sum(getattr(script, name) for script in scripts) for name in ("loops", "written"))
            raise ModhifiError(
                f"{loaded.source} writes loops: {loops} of {written} texts repeat themselves; give text "
                "with --data text:FILE"
            )
    rounds = zip_longest(*(script.windows(share) for script, share in zip(able, shares, strict=True)))
    turns = [
        (window, script.writer.name)
        for one in rounds
        for window, script in zip(one, able, strict=True)
        if window is not None
    ]
    remarks = [
        f"self, {n} windows of {length} tokens",
        *(script.what(share) for script, share in zip(able, shares, strict=True)),
    ]
    remarks += [f"{able[0].writer.how}, seed {seed}"]
    remarks += [f"nothing but loops from {script.writer.what}" for script in scripts if script not in able]
    kinds = ",".join(kind for _, kind in turns)
    return torch.stack([window for window, _ in turns]), {"kinds": kinds, "description": ", ".join(remarks)}


class Script:
    """What one kind of beginning has given so far; kind ``number`` draws by a seed of its own."""

    def __init__(self, writer: Resampler | Continuer, seed: int, number: int) -> None:
        self.writer, self.chance = writer, torch.Generator().manual_seed(seed + (number << 32))
        self.texts: dict[str, Tensor] = {}
        self.loops = self.written = 0

    def fill(self, windows: int, progress: Told) -> bool:
        """Write until there are so many windows; whether that came to be."""
        pieces, wanted = self.writer.pieces, windows * self.writer.pieces
        while len(self.texts) < wanted and self.written < ATTEMPTS * wanted + BATCH:
            progress(f"writing, {self.writer.name}", len(self.texts) // pieces, windows)
            for tokens in self.writer.write(min(self.writer.batch * pieces, wanted - len(self.texts)), self.chance):
                self.written += 1
                if is_loop(tokens):
                    self.loops += 1
                else:
                    self.texts.setdefault(identity(tokens), tokens)
        progress(f"writing, {self.writer.name}", windows, windows)
        return len(self.texts) >= wanted

    def windows(self, count: int) -> list[Tensor]:
        """The first ``count`` windows."""
        texts, pieces = list(self.texts.values()), self.writer.pieces
        return [self.writer.window(texts[i : i + pieces]) for i in range(0, count * pieces, pieces)]

    def what(self, count: int) -> str:
        """The first ``count`` windows in words."""
        remarks = [f"{count} written from {self.writer.what}"]
        remarks += [f"{self.writer.pieces} texts in each"] * (self.writer.pieces > 1)
        remarks += [f"{self.loops} loops rejected"] * bool(self.loops)
        dropped = self.written - self.loops - len(self.texts)
        remarks += [f"{dropped} duplicates dropped"] * (dropped > 0)
        return remarks[0] + (f" ({', '.join(remarks[1:])})" if remarks[1:] else "")


def is_loop(tokens: Tensor) -> bool:
    """Whether a text, int64 ``(T,)``, repeats itself so much that it is no text."""
    runs = tokens.unfold(0, min(RUN, len(tokens)), 1)
    return len(torch.unique(runs, dim=0)) < LEAST_DIFFERENT * len(runs)


class Continuer:
    """Writes texts on from one kind of beginning, of which ``pieces`` fill a window of ``length`` tokens."""

    how, batch = f"sampled at temperature 1 from the likeliest {NUCLEUS:.0%}", BATCH

    def __init__(self, loaded: LoadedModel, length: int, beginning: Beginning) -> None:
        self.loaded, self.length, self.beginning = loaded, length, beginning
        self.name, self.what = beginning.name, beginning.what
        own = max(1, length - len(beginning.front))
        self.pieces = max(1, round(own / beginning.length))
        self.text = math.ceil(own / self.pieces)

    def write(self, count: int, chance: torch.Generator) -> Tensor:
        """Texts, int64 ``(count, text)``; the draws are made on the CPU."""
        starts, hidden = self.beginning.starts, self.beginning.hidden
        begin = starts[torch.randint(len(starts), (count,), generator=chance)][:, : self.text + hidden]
        return continued(self.loaded, begin, self.text + hidden, chance)[:, hidden:]

    def window(self, texts: list[Tensor]) -> Tensor:
        """A window, int64 ``(length,)``, of ``pieces`` texts."""
        return torch.cat([self.beginning.front, *texts])[: self.length]


def continued(loaded: LoadedModel, tokens: Tensor, length: int, chance: torch.Generator) -> Tensor:
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
    2020). Raises ModhifiError for logits that are not finite.
    """
    shares = logits.float().softmax(-1)
    places = torch.rand(len(shares), 1, generator=chance).to(shares.device)
    likeliest, order = shares.topk(min(LIKELIEST, shares.shape[-1]))
    if not bool(likeliest.isfinite().all()):
        raise ModhifiError("the model's logits are not finite while it writes; load it in float32, or give text")
    drawn = _at(places, likeliest, order)
    flat = (likeliest.sum(-1) < NUCLEUS).nonzero()[:, 0]
    if len(flat):
        drawn[flat] = _at(places[flat], *shares[flat].sort(descending=True))
    return drawn.cpu()


def _at(places: Tensor, shares: Tensor, order: Tensor) -> Tensor:
    """The tokens at ``places`` ``(n, 1)`` in [0, 1) of the nucleus; ``shares`` ``(n, k)`` fall, those of ``order``."""
    sums = shares.cumsum(-1)
    last = (sums - shares < NUCLEUS).sum(-1, keepdim=True) - 1
    drawn = torch.searchsorted(sums, places * sums.gather(-1, last), right=True)
    return order.gather(-1, drawn.minimum(last))  # a place next to 1 may be rounded to it
