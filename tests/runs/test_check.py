"""What a check says of a whole model: what can be cut of it, what loads it afterwards, what a run would take."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_transformers
from torch import Tensor

from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.stages import TRIAL_TOKENS
from modhifi.runs.check import check_model


def test_the_supported_parameters_are_those_that_go_with_every_component() -> None:
    model = tiny_transformers.family("llama")[0].float()
    report = check_model(load_model(model))
    writers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    readers = ("o_proj.weight", "down_proj.weight")  # their biases stay
    goes = {n: p.numel() for n, p in model.named_parameters() if any(w in n for w in writers) or n.endswith(readers)}
    heads = sum(count for name, count in goes.items() if "self_attn" in name)
    supported = report["supported"]
    assert supported["parameters"] == sum(goes.values())
    assert supported["share"] == sum(goes.values()) / sum(p.numel() for p in model.parameters())
    assert [(row["pattern"], row["groups"], row["components"], row["parameters"]) for row in supported["patterns"]] == [
        ("model.layers.*.self_attn.q_proj", 2, [2], heads),
        ("model.layers.*.mlp.gate_proj", 2, [40], sum(goes.values()) - heads),
    ]


def test_equal_refusals_are_one() -> None:
    report = check_model(load_model(tiny_transformers.family("llama")[0].float()))
    assert report["folded"][0] == {
        "reason": "their width is the hidden size",
        "groups": 4,
        "on_request": False,
        "names": ["model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"],
    }
    assert sum(row["groups"] for row in report["folded"]) == len(report["refused"])


def test_a_head_that_is_the_embedding_too_is_refused_for_that() -> None:
    report = check_model(load_model(tiny_transformers.family("llama, tied")[0].float()))
    assert report["refused"][-1]["name"] == "lm_head" and "shared with another layer" in report["refused"][-1]["reason"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("llama", "stock transformers with fewer heads and neurons, as many in every block"),
        (
            "gpt2",
            "stock transformers with fewer neurons, as many in every block (there lie 57 % of the parameters, of 86 % "
            "that can go); modhifi.load alone with fewer heads",
        ),
        ("convnext_atto", "modhifi.load alone with fewer channels"),
    ],
)
def test_the_check_says_what_loads_the_model_after_a_cut(name: str, sentence: str) -> None:
    assert check_model(load_model(tiny_transformers.family(name)[0].float()))["loads_with"] == sentence


def test_the_check_counts_mixtures_and_their_experts() -> None:
    report = check_model(load_model(tiny_transformers.family("mixtral")[0].float()))
    assert report["mixtures"][0] == {"name": "model.layers.0.mlp", "experts": 4, "chosen": 2}
    assert [g["kind"] for g in report["groups"] if "experts" in g["name"]] == ["neurons of 4 experts"] * 2


def test_the_predicted_memory_holds_two_models_and_every_gram() -> None:
    model = tiny_transformers.family("llama")[0].float()
    weights = sum(p.numel() * 4 for p in model.parameters())
    widths = (24, 40)  # what an o_proj reads (4 heads of 6) and a down_proj
    grams = [2 * 8 * width**2 for width in widths]
    prediction = check_model(load_model(model))["prediction"]
    without = prediction["bytes"] - prediction["activations"]
    solved = 3 * 8 * max(widths) ** 2 + 5 * 8 * model.config.hidden_size * max(widths)  # Grams, and weights in float64
    assert without == 2 * weights + sum(grams) + solved
    assert prediction["disk"] == sum(grams)
    assert prediction["seconds"] > 0 and prediction["activations"] > 0


def test_a_causal_model_is_tried_out_on_few_tokens_and_timed_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(tiny_transformers.family("llama")[0].float())
    lengths: list[int] = []
    forward = LoadedModel._forward

    def counting(self: LoadedModel, batch: Tensor, *args: Any, **named: Any) -> Any:
        lengths.append(batch.shape[1])
        return forward(self, batch, *args, **named)

    monkeypatch.setattr(LoadedModel, "_forward", counting)
    check_model(loaded)
    # Tracing, branches and the forecast read the whole example; four trials take two passes each, and ranks three.
    assert sorted(lengths) == [TRIAL_TOKENS] * 11 + [loaded.example.shape[1]] * 3
