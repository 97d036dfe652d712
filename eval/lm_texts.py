"""Kinds of text that a language model meets, each as windows that calibrate nothing: what an edit is judged by."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data import topics
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Missing, wikitext_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from modhifi.data.beginnings import beginnings
from modhifi.data.in_memory import from_items
from modhifi.data.samples import Samples
from modhifi.data.self_generated import Continuer, Script, continued
from modhifi.data.sources import load_samples
from modhifi.models.loaded import LoadedModel
from modhifi.progress import silent

# Questions as users ask them, for dialogues in the model's own template.
QUESTIONS = """What is the capital of Australia, and why was it chosen?
Can you explain how photosynthesis works to a child?
Write a short poem about the sea.
How do I boil an egg so that the yolk stays soft?
My neighbour plays loud music at night. What should I say to her?
What is the difference between a virus and a bacterium?
Give me three ideas for a birthday present for my father.
How many legs does a spider have, and how many does an ant have?
Translate "good morning, my friend" into French and Spanish.
Why is the sky blue during the day and red in the evening?
Summarise the story of Romeo and Juliet in four sentences.
I have 12 apples and give away a third of them. How many are left?
What should I pack for a week in the mountains?
Who wrote The Origin of Species, and what is it about?
Write a Python function that reverses a list.
How can I get better at remembering names?
What is inflation, and who gains from it?
Suggest a simple dinner with rice, tomatoes and eggs.
What happened in the year 1969?
Is it safe to look at a solar eclipse?
How do aeroplanes stay in the air?
Please write a polite email that asks for a day off.
What are the rules of chess in a few words?
Tell me a joke about computers.""".splitlines()
# The seed of what the model writes, another one than calibration has, and the tokens of an answer.
SEED, ANSWER = 7, 72


def folder_of(documents: dict[str, str], loaded: LoadedModel, n: int, window: int) -> Samples:
    """At most ``n`` windows from documents by name."""
    with TemporaryDirectory() as folder:
        for name, text in documents.items():
            (Path(folder) / f"{name}.txt").write_text(text, encoding="utf-8")
        return load_samples(f"text:{folder}", loaded, n=n, window=window)


def wikitext(loaded: LoadedModel, n: int, window: int) -> Samples:
    """Articles of WikiText-2's validation text."""
    return load_samples(f"text:{wikitext_file()}", loaded, n=n, window=window)


def reference(loaded: LoadedModel, n: int, window: int) -> Samples:
    """Topics of Python's reference."""
    return folder_of(dict(topics.topics), loaded, n, window)


def code(loaded: LoadedModel, n: int, window: int) -> Samples:
    """Modules of Python's standard library."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return folder_of({f.stem: f.read_text(encoding="utf-8") for f in files}, loaded, n, window)


def one_kind(loaded: LoadedModel, n: int, window: int) -> Samples:
    """What the model writes from its own beginning alone: one of the three kinds that ``self`` has."""
    script = Script(Continuer(loaded, window, beginnings(loaded)[0]), 0, 0)
    if not script.fill(n, silent):
        raise Missing("a model that writes no loops")
    return from_items(script.windows(n), None, n=n, seed=0)


def own(loaded: LoadedModel, n: int, window: int) -> Samples:
    """What the model writes from its own beginning, by another seed than calibration has."""
    writer = Continuer(loaded, window, beginnings(loaded)[0])
    texts = writer.write(n * writer.pieces, torch.Generator().manual_seed(SEED))
    return from_items([writer.window(list(few)) for few in texts.split(writer.pieces)], None, n=n, seed=0)


def dialogue(loaded: LoadedModel, n: int, window: int) -> Samples:
    """Questions as users ask them in the model's chat template, answered by the model."""
    tokenizer, chance = loaded.tokenizer, torch.Generator().manual_seed(SEED)
    turns: list[Tensor] = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(  # type: ignore[union-attr]
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        begin = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])  # type: ignore[misc]
        turns.append(continued(loaded, begin, begin.shape[1] + ANSWER, chance)[0])
    windows = torch.cat(turns).unfold(0, window, window)
    return from_items(list(windows[:n].clone()), None, n=n, seed=0)


KINDS: dict[str, Callable[[LoadedModel, int, int], Samples]] = {
    "WikiText-2": wikitext,
    "Python's reference": reference,
    "Python's code": code,
    "own writing": own,
    "dialogue": dialogue,
}


def stacked(samples: Samples) -> Tensor:
    return torch.stack([samples.load(i) for i in range(len(samples))])


class Judge:
    """Compares edited models with the dense one on held-out windows ``(n, tokens)`` of every kind.

    ``kept`` returns what a function makes, by a name under which it may have been kept.
    """

    COLUMNS = ("worst", "mean", *KINDS, "lowest agreement")

    def __init__(
        self, loaded: LoadedModel, held: Mapping[str, Tensor], kept: Callable[[str, Callable[[], Any]], Any]
    ) -> None:
        self.loaded, self.held = loaded, held
        self.dense: dict[str, tuple[float, Tensor]] = kept("dense", lambda: self.measured(loaded.model))

    @torch.inference_mode()
    def measured(self, model: nn.Module) -> dict[str, tuple[float, Tensor]]:
        """By kind the mean loss of the next token, and the likeliest token everywhere."""
        result = {}
        for kind, windows in self.held.items():
            losses, tops = [], []
            for batch in windows.split(4):
                logits = self.loaded.logits(batch, model).float()
                losses.append(cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
                tops.append(logits.argmax(-1))
            result[kind] = float(torch.cat(losses).mean()), torch.cat(tops)
        return result

    def row(self, model: nn.Module) -> dict[str, float]:
        """Perplexity over the dense model's by kind, the worst and the geometric mean, and the lowest agreement."""
        after = self.measured(model)
        growth = {kind: loss - self.dense[kind][0] for kind, (loss, _) in after.items()}
        agreement = [float((top == self.dense[kind][1]).double().mean()) for kind, (_, top) in after.items()]
        ratios = {kind: math.exp(value) for kind, value in growth.items()}
        mean = math.exp(sum(growth.values()) / len(growth))
        return {"worst": max(ratios.values()), "mean": mean, **ratios, "lowest agreement": min(agreement)}
