from __future__ import annotations

from pathlib import Path

import pytest
import tiny_text
import torch

from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.runs.reports.continuations import BEGINNING, TEXTS, WRITTEN, continuations


def test_both_models_go_on_greedily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_text.save(tmp_path / "model")
    loaded, edited = load_model(tmp_path / "model"), load_model(tmp_path / "model").model
    torch.nn.init.normal_(edited.lm_head.weight, generator=torch.Generator().manual_seed(1))
    (tmp_path / "text.txt").write_text(tiny_text.articles(8))
    held = load_samples(f"text:{tmp_path}/text.txt", loaded, n=4, window=24)
    texts = continuations(loaded, edited, held)
    assert len(texts) == TEXTS
    for number, text in enumerate(texts):
        beginning = held.load(number)[None, :BEGINNING]
        assert text["beginning"] == loaded.tokenizer.decode(beginning[0], skip_special_tokens=True)
        for name, model in (("before", loaded.model), ("after", edited)):
            tokens = beginning
            with torch.no_grad():
                for _ in range(WRITTEN):
                    following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                    tokens = torch.cat([tokens, following], 1)
            written = tokens[0, BEGINNING:].tolist()
            until_end = written[: written.index(2)] if 2 in written else written
            assert text[name] == loaded.tokenizer.decode(until_end, skip_special_tokens=True)
    assert texts[0]["before"] != texts[0]["after"]

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no cache")

    monkeypatch.setattr(edited, "generate", broken)
    with pytest.raises(ModhifiError, match="the edited model cannot write, and the original can: no cache"):
        continuations(loaded, edited, held)
    monkeypatch.setattr(loaded.model, "generate", broken)
    assert continuations(loaded, edited, held) == []
