"""A tiny causal language model on disk, with a tokenizer of whole words and texts it can read."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from modhifi.data.samples import Samples

WORDS = [a + b for a in ("ba", "ke", "li", "no", "su", "ta") for b in ("ra", "mo", "ni", "pe", "du", "fo", "gi", "za")]
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = len(SPECIAL) + len(WORDS)


def tokenizer(begin: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Words split at blanks; ``begin`` puts ``<s>`` before every text."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", **({"bos_token": "<s>"} if begin else {})
    )


def framing_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The same words, framed by ``[CLS]`` and ``[SEP]``, with a ``[MASK]``: the last three ids."""
    plain = tokenizer(begin=False)
    frame = ["[CLS]", "[SEP]", "[MASK]"]
    plain.add_special_tokens({"cls_token": frame[0], "sep_token": frame[1], "mask_token": frame[2]})
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, VOCABULARY + i) for i, token in enumerate(frame)]
    )
    return plain


def llama(begin: bool = True, **changes: object) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1 if begin else None,
            "eos_token_id": 2,
            "pad_token_id": None,
            "initializer_range": 0.3,
            **changes,
        }  # type: ignore[arg-type]
    )
    return transformers.LlamaForCausalLM(config).eval()


def token_samples(lengths: list[int]) -> Samples:
    """Texts of these lengths in random tokens."""
    items = [
        torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)
    ]
    names = tuple(str(i) for i in range(len(lengths)))
    return Samples(lambda i: items[i], names, None, names, "tokens", False)


def save(
    directory: Path,
    begin: bool = True,
    with_tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> Path:
    llama(begin, **changes).to(dtype).save_pretrained(directory)
    if with_tokenizer:
        tokenizer(begin).save_pretrained(directory)
    return directory


def write(seed: int, words: int) -> str:
    chance = random.Random(seed)
    return "\n".join(" ".join(chance.choices(WORDS, k=12)) for _ in range(words // 12))


def articles(count: int, words: int = 240) -> str:
    """A text in WikiText's layout: articles under headings, each of its own words."""
    return "".join(
        f" = Title {i} = \n\n{write(i, words)}\n\n = = Part = = \n{write(1000 + i, 24)}\n" for i in range(count)
    )
