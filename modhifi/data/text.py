"""Text that a user has: files or a dataset of the Hugging Face hub, cut into windows of tokens.

A window is as long as every other, so nothing is padded. Windows are drawn from as many documents as there are, and
from far-apart places inside one, because neighbouring windows of one text are not independent.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modhifi.data.hidden import is_hidden
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models import hub
from modhifi.models.loaded import LoadedModel
from modhifi.models.parts import vocabulary_of

# Tokens of a window where nothing is said, if the model takes as many.
WINDOW = 1024
# A text of fewer documents is cut into stretches, which then count as its documents: at most so many, and each of at
# least so many characters for one token of a window.
FEWEST, STRETCHES, STRETCH = 4, 64, 8
# A heading of the first level as WikiText writes it: " = Title = " on a line of its own.
HEADING = re.compile(r"(?m)^(?= ?= [^=\n]+ = ?$)")
# Characters of a data set's short rows that are read for one token wanted.
CHARACTERS = 64


@dataclass(frozen=True)
class Cutter:
    """Turns documents into windows of one model's tokens, ``length`` each with the tokenizer's own frame around."""

    tokenizer: Any
    length: int
    vocabulary: int

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and behind a text, [CLS] and [SEP] say.

        Raises ModhifiError where they fill a window.
        """
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = self.tokenizer("a")["input_ids"]
        at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
        if len(framed) - len(plain) >= self.length:
            raise ModhifiError(
                f"a window of {self.length} tokens is no longer than the tokenizer's frame; give a larger --window"
            )
        return framed[:at], framed[at + len(plain) :]

    def tokens(self, document: str) -> list[int]:
        """Token ids of a text without its frame. Raises ModhifiError for ids that the model has no embedding of."""
        ids: list[int] = self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if ids and max(ids) >= self.vocabulary:
            raise ModhifiError(
                f"the tokenizer gives token {max(ids)} and the model knows {self.vocabulary}; they do "
                "not belong together"
            )
        return ids

    def windows(self, document: str) -> list[Tensor]:
        """Every full window of a document, int64 ``(length,)``; what is left over at its end is dropped."""
        before, behind = self.frame
        inner = self.length - len(before) - len(behind)
        ids = self.tokens(document)
        return [torch.tensor(before + ids[i : i + inner] + behind) for i in range(0, len(ids) - inner + 1, inner)]


def from_files(path: Path, loaded: LoadedModel, n: int, seed: int, window: int | None) -> Samples:
    """At most `n` windows of a text file, or of the ``.txt`` and ``.md`` files under a directory.

    A file's documents are the articles under its headings of the first level, or the file itself. Hidden files and
    folders are passed over. Raises ModhifiError if nothing can be read, without a tokenizer, and for a text shorter
    than one window.
    """
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".txt", ".md") and p.is_file())
        files = [p for p in files if not any(map(is_hidden, (p, *p.relative_to(path).parents)))]
    if not files or not path.exists():
        raise ModhifiError(f"no text at {path}; give a text file, or a folder of .txt files, as text:PATH")
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ModhifiError(f"cannot read {path} as UTF-8 text: {error}; give a plain text file") from error
    return _drawn([d for text in texts for d in HEADING.split(text)], f"text:{path}", loaded, n, seed, window)


def from_dataset(rest: str, loaded: LoadedModel, n: int, seed: int, window: int | None) -> Samples:
    """At most `n` windows of ``DATASET[:SPLIT]``, anything that ``datasets.load_dataset`` takes.

    The text column is ``text``, ``content`` or the first of strings. Long rows are documents; short ones are lines of
    one text. Raises ModhifiError without the `datasets` package, the dataset or a text column.
    """
    name, table = hub.dataset(rest)
    strings = [c for c, feature in table.features.items() if getattr(feature, "dtype", None) == "string"]
    column = next((c for c in ("text", "content", *strings) if c in strings), None)
    if column is None:
        raise ModhifiError(f"dataset {name} has no text column (it has {', '.join(table.features)}); use another")
    length = window_of(loaded, window)
    order = np.random.default_rng(seed).permutation(len(table)).tolist()
    rows = [str(table[i][column] or "") for i in order[:100]]
    if sum(map(len, rows)) >= len(rows) * length * STRETCH:
        documents = [str(table[i][column] or "") for i in order[: 4 * n]]
    else:
        lines, left = [], n * length * CHARACTERS
        for row in table:
            lines.append(str(row[column] or "").rstrip("\n"))
            left -= len(lines[-1])
            if left < 0:
                break
        documents = HEADING.split("\n".join(lines))
    return _drawn(documents, f"hf:{rest}", loaded, n, seed, window)


def cutter_of(loaded: LoadedModel, window: int | None) -> Cutter:
    """The model's own tokenizer as a :class:`Cutter`. Raises ModhifiError if it has none or takes no text."""
    length = window_of(loaded, window)
    if loaded.tokenizer is None:
        raise ModhifiError(
            f"{loaded.source} comes without a tokenizer, which text needs; put its tokenizer files "
            "(tokenizer.json) beside its config.json"
        )
    return Cutter(loaded.tokenizer, length, vocabulary(loaded))


def window_of(loaded: LoadedModel, window: int | None) -> int:
    """The number of tokens in a window: `window`, or the default as far as the model takes it.

    Raises ModhifiError for models without text and for more tokens than the model takes.
    """
    if loaded.kind not in ("text", "encoder"):
        raise ModhifiError(f"{loaded.source} takes no text (kind {loaded.kind}); use images:DIR or synthetic")
    limits = [
        getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None),  # type: ignore[union-attr,operator]
        getattr(loaded.tokenizer, "model_max_length", None),
        *_numbered(loaded.model),
    ]
    longest = min((int(limit) for limit in limits if limit), default=window or WINDOW)
    if window is not None and window > longest:
        raise ModhifiError(f"windows of {window} tokens were asked for and {loaded.source} takes {longest} at most")
    return min(WINDOW, longest) if window is None else window


def _numbered(model: nn.Module) -> list[int]:
    """How many tokens RoBERTa and its kin can number: they begin behind the number of the padding."""
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    return [
        table.num_embeddings - table.padding_idx - 1
        for table in tables
        if isinstance(table, nn.Embedding) and table.padding_idx is not None
    ]


def vocabulary(loaded: LoadedModel) -> int:
    """How many different tokens the model knows."""
    return vocabulary_of(loaded.model.config)


def identity(tokens: Tensor) -> str:
    """Hash of a window's token ids: 16 hex digits of a SHA-256."""
    return hashlib.sha256(np.ascontiguousarray(tokens.numpy()).tobytes()).hexdigest()[:16]


def _drawn(
    documents: Sequence[str], source: str, loaded: LoadedModel, n: int, seed: int, window: int | None
) -> Samples:
    """At most `n` different windows, from as many documents as possible and evenly spread inside each."""
    cutter = cutter_of(loaded, window)
    documents = [d for d in documents if d.strip()]
    whole = "".join(documents)
    stretched = len(documents) < FEWEST
    if stretched:
        documents = _stretches(whole, cutter.length)
    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    by_hash = _spread(documents, order, cutter, n)
    if not by_hash:
        # No stretch or document holds a window of its own, but the text may.
        stretched, documents = True, [whole]
        by_hash = _spread(documents, [0], cutter, n)
    if not by_hash:
        raise ModhifiError(
            f"{source} holds {len(cutter.tokens(whole))} tokens, less than one window of "
            f"{cutter.length}; give a longer text or a smaller --window"
        )
    windows = list(by_hash.values())
    used = len({document for document, _, _ in windows})
    what = "places in one text" if stretched else "documents"
    remarks = [f"{source}, {len(windows)} windows of {cutter.length} tokens from {used} {what}, seed {seed}"]
    remarks += [f"{n} were asked for"] * (len(windows) < n)
    return Samples(
        load=lambda i: windows[i][2],
        hashes=tuple(by_hash),
        labels=None,
        names=tuple(f"{source} part {document} window {number}" for document, number, _ in windows),
        description=", ".join(remarks),
        synthetic=False,
        units=tuple(document for document, _, _ in windows) if used > 1 else None,
    )


def _stretches(text: str, length: int) -> list[str]:
    """A text cut at ends of lines into stretches of about equal size, each long enough for a window of `length`."""
    count = max(1, min(STRETCHES, len(text) // (STRETCH * length)))
    size, lines = len(text) / count, text.splitlines(keepends=True)
    stretches, seen = [""] * count, 0
    for line in lines:
        stretches[min(count - 1, int(seen / size))] += line
        seen += len(line)
    return stretches


def _spread(documents: Sequence[str], order: list[int], cutter: Cutter, n: int) -> dict[str, tuple[int, int, Tensor]]:
    """Windows by their hash: the document's number, the window's number in it, the tokens."""
    cut: dict[int, list[Tensor]] = {}
    most = max(1, n // len(documents))
    while True:
        by_hash: dict[str, tuple[int, int, Tensor]] = {}
        for document in order:
            if document not in cut:
                cut[document] = cutter.windows(documents[document])
            windows = cut[document]
            for at in np.linspace(0, len(windows) - 1, min(most, len(windows))).round().astype(int).tolist():
                by_hash.setdefault(identity(windows[at]), (document, at, windows[at]))
            if len(by_hash) >= n:
                return dict(list(by_hash.items())[:n])
        if most >= max(map(len, cut.values())):
            return by_hash
        most *= 2
