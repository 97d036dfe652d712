"""What a program gives: modules in other modes and orders, data that cannot be, devices that are not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny_transformers
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional

import modhifi
from modhifi.api import _classes
from modhifi.data.in_memory import from_items, held_items
from modhifi.data.mixture import Mixture, mixed
from modhifi.data.samples import synthetic_items
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.manifest import Base, Manifest
from modhifi.models.packing import pack_batch
from modhifi.runs.devices import resolve_device
from modhifi.runs.inputs import located, original_of

FEW = {"samples": 40, "evaluation_samples": 16, "checks": {"walked": 0}}


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    ).eval()


def pixels(n: int = 80) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_module_in_train_mode_is_not_healed_and_stays_as_it_is() -> None:
    model = conv()
    small = modhifi.prune(model, pixels(), ratio=0.5, **FEW).model.train()
    before = small[1].running_mean.clone()
    with pytest.raises(ModhifiError, match=r"the edited model is in train mode.*call \.eval\(\) first"):
        modhifi.heal(small, pixels(), against=model, steps=1, **FEW)
    assert torch.equal(small[1].running_mean, before)


def test_channels_last_is_saved_and_reloaded(tmp_path: Path) -> None:
    model = conv().to(memory_format=torch.channels_last)
    small = modhifi.prune(model, pixels(), ratio=0.5, out=tmp_path / "small", **FEW)
    assert small.model is not None and all(p.is_contiguous() for p in small.model.parameters())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)  # the program's own stays
    again = modhifi.load(tmp_path / "small", skeleton=model)
    edited = again.to(memory_format=torch.channels_last)
    healed = modhifi.heal(edited, pixels(), against=model, steps=2, out=tmp_path / "healed", **FEW)
    assert healed.path is not None and edited[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_sources_with_a_share_are_strings_still() -> None:
    assert held_items("text:a.txt@0.3") == "text:a.txt@0.3"
    assert held_items(["text:a.txt@0.3"]) == "text:a.txt@0.3"


def test_data_that_cannot_be_is_one_line() -> None:
    model = conv()
    small = modhifi.prune(model, pixels(), ratio=0.5, **FEW).model
    assert small is not None
    loader = torch.utils.data.DataLoader(pixels())
    with pytest.raises(ModhifiError, match="data is DataLoader; give a source string, a tensor, a list or a Dataset"):
        modhifi.heal(small, loader, against=model, steps=1, **FEW)
    with pytest.raises(ModhifiError, match="to have 3 channels, but got 4 channels"):
        modhifi.heal(small, torch.randn(80, 4, 8, 8), against=model, steps=1, **FEW)
    with pytest.raises(ModhifiError, match="--augment flips and shifts images"):
        mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        modhifi.heal(mlp, torch.randn(80, 8), against=mlp, steps=1, method={"augment": True}, **FEW)
    with pytest.raises(ModhifiError, match="an export is written beside the model"):
        modhifi.prune(model, pixels(), ratio=0.5, export=["pt2"], **FEW)
    with pytest.raises(ModhifiError, match=r"\(3, 9, 9\).*\(3, 8, 8\).*give sources of one shape"):
        modhifi.prune(model, Mixture([pixels(), torch.randn(80, 3, 9, 9)]), ratio=0.5, **FEW)


def test_texts_of_several_lengths_are_mixed() -> None:
    short = synthetic_items(lambda i: torch.full((5,), i), 4, "short")
    long = synthetic_items(lambda i: torch.full((7,), i), 4, "long")
    assert len(mixed([("short", 0.5, short), ("long", 0.5, long)])) == 8


def test_a_label_of_minus_one_is_none() -> None:
    rows = [(item, -1) for item in pixels(10)]
    assert from_items(rows, None, n=10, seed=0).labels is None
    with pytest.raises(ModhifiError, match="some items of the data have a label and some have none"):
        from_items([*rows, (torch.ones(3, 8, 8), 2)], None, n=11, seed=0)


@pytest.mark.parametrize(("last", "used"), [(4, True), (5, False)])
def test_labels_beyond_the_classes_are_none(last: int, used: bool) -> None:
    items = [(image, min(number, last)) for number, image in enumerate(pixels())]
    report = modhifi.prune(conv(), items, ratio=0.5, **FEW).report
    assert ("accuracy_before" in report["errors"]) is used
    assert ("labels unused: class index 5 of a model of 5 classes" in report["data"]["held_out"]) is not used


def test_tokens_beyond_the_vocabulary_are_named() -> None:
    with pytest.raises(ModhifiError, match="holds the token 50, and the model knows 50"):
        from_items([torch.tensor([1, 50])], None, n=1, seed=0, ragged=True, tokens=50)
    assert len(from_items([torch.tensor([1, 49])], None, n=1, seed=0, ragged=True, tokens=50)) == 1


@pytest.mark.parametrize("name", ["gpu", "cuda:7", "mps", torch.device("cuda", 7)])
def test_a_device_that_is_not_there_is_one_line(name: str | torch.device) -> None:
    if torch.cuda.device_count() > 7 or (name == "mps" and torch.backends.mps.is_available()):
        pytest.skip("it is there")
    with pytest.raises(ModhifiError, match="is not available here"):
        modhifi.prune(conv(), pixels(), ratio=0.5, device=name, **FEW)


def test_a_device_may_be_given_as_torch_has_it() -> None:
    assert resolve_device(torch.device("cpu")) == resolve_device("cpu") == torch.device("cpu")


def test_recipes_hold_whole_paths_of_every_source_and_no_hub_name_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sounds", "pairs.tsv", "org/name"):
        (tmp_path / name).mkdir(parents=True)
    content = {"data": {"source": ["audio:sounds@0.5", "pairs:pairs.tsv"]}, "model": {"name": "hf:org/name"}}
    assert located(content) == {
        "data": {"source": [f"audio:{tmp_path}/sounds@0.5", f"pairs:{tmp_path}/pairs.tsv"]},
        "model": {"name": "hf:org/name"},
    }


def test_an_original_that_a_program_held_is_asked_for() -> None:
    base = Base(source="module:ResNet")
    with pytest.raises(ModhifiError, match="the original is a ResNet that a Python program held; give it: --against"):
        original_of(Manifest.model_construct(base=base, recipe={}, task="prune"))


def test_a_target_that_is_no_class_is_no_label() -> None:
    items = [(item, torch.tensor(0.5 * number)) for number, item in enumerate(pixels(10))]
    assert from_items(items, None, n=10, seed=0).labels is None
    whole = from_items([(item, torch.tensor(2.0)) for item in pixels(10)], None, n=10, seed=0)
    assert whole.labels is not None and whole.labels.tolist() == [2] * 10


def test_a_module_that_changes_its_input_is_measured_on_what_was_given() -> None:
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.div_(2.0))

    items, model = pixels(), Halving().eval()
    before = items.clone()
    small = modhifi.prune(model, items, ratio=0.5, **FEW)
    plain = modhifi.prune(model.body, before / 2, ratio=0.5, **FEW)
    assert torch.equal(items, before) and not any("pass" in w for w in small.report["warnings"])
    for key in ("agreement", "relative_error"):
        assert small.report["errors"][key] == pytest.approx(plain.report["errors"][key], rel=1e-4)


def test_a_module_of_which_nothing_can_go_is_told_why() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2)).eval()
    with pytest.raises(ModhifiError, match="no group of this model can be pruned with these settings; ") as caught:
        modhifi.prune(model, torch.randn(80, 8), ratio=0.5)
    assert ": " in str(caught.value) and "\n" not in str(caught.value) and "says why" not in str(caught.value)


@pytest.mark.parametrize(("form", "main"), [(lambda a, b: (a, b), "0"), (lambda a, b: {"x": a, "logits": b}, "logits")])
def test_a_module_of_several_outputs_says_which_one_is_looked_at(form: Callable[..., Any], main: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other = conv(), nn.Linear(192, 3)

        def forward(self, x: Tensor) -> Any:
            return form(self.body(x), self.other(x.flatten(1)))

    small = modhifi.prune(Two().eval(), pixels(), ratio=0.5, **FEW)
    told = "module:Two returns 2 tensors, and what is planned, measured and bounded is '{}' alone"
    assert any(told.format(main) in warning for warning in small.report["warnings"])
    alone = modhifi.prune(conv(), pixels(), ratio=0.5, **FEW)
    assert not any("tensors" in warning for warning in alone.report["warnings"])


class Both(nn.Module):
    """Reads rows of an odd number of half precision beside whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.ids, self.out = nn.Linear(7, 64), nn.Linear(4, 64), nn.Linear(64, 4)

    def forward(self, rows: Tensor, ids: Tensor) -> Tensor:
        return self.out((self.rows(rows.float()) + self.ids(ids.float())).relu())


def several(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 7, generator=generator).half(), torch.randint(9, (n, 4), generator=generator)


def test_models_of_several_inputs_are_timed_and_weighed() -> None:
    loaded = load_model(Both(), example=several(2))
    items = [*zip(*several(80), strict=True)]
    small = modhifi.prune(loaded, items, memory="0.9x", **FEW)
    assert small.report["budget"]["reached"]["memory"] < 0.95
    rows = modhifi.bench(loaded, batch=(1, 3)).rows
    assert [(row.batch, row.reason) for row in rows] == [(1, ""), (3, "")]
    with pytest.raises(ModhifiError, match="has one input, and this model reads several"):
        modhifi.bench(loaded, runtime=("onnx",))


def test_a_batch_of_one_item_is_read_from_any_byte_on() -> None:
    packing, packed = pack_batch(several(2))
    for number, wanted in enumerate(zip(*several(2), strict=True)):
        found = packing.nest(packed[number : number + 1])
        assert all(torch.equal(one[0], other.to(one.dtype)) for one, other in zip(found, wanted, strict=True))


def test_a_library_model_changed_by_hand_is_given_back_with_its_dense_module(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=5).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 0.1
    items = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small = modhifi.prune(model, items, ratio=0.3, out=tmp_path / "small", **FEW)
    with pytest.raises(ModhifiError, match="pass that dense module"):
        modhifi.load(tmp_path / "small")
    again = modhifi.load(tmp_path / "small", skeleton=model)
    with torch.no_grad():
        assert small.model is not None and torch.equal(again(items[:2]), small.model(items[:2]))


def test_attention_is_that_which_transformers_loads(tmp_path: Path) -> None:
    model = tiny_transformers.family("vit")[0]
    model.float().set_attn_implementation("eager")
    items = torch.randn(60, *load_model(model).example.shape[1:], generator=torch.Generator().manual_seed(0))
    small = modhifi.prune(model, items, ratio=0.3, out=tmp_path / "small", **FEW)
    assert model.config._attn_implementation == "eager"
    assert small.model is not None and small.model.config._attn_implementation == "sdpa"
    assert any("attention was eager and is sdpa" in note for note in small.report["model"]["notes"])


def test_layers_without_weights_and_ones_ready_to_be_quantised() -> None:
    with pytest.raises(ModhifiError, match="module '0' has no weights yet; run the model once"):
        modhifi.prune(nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4)), torch.randn(32, 8), ratio=0.5)

    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.sum = nn.Linear(8, 32), nn.Linear(32, 4), FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).relu()
            return self.second(self.sum.add(hidden, hidden))

    assert modhifi.prune(Adding(), torch.randn(80, 8), ratio=0.5, **FEW).model.first.out_features == 16


def test_what_cannot_be_distilled_is_one_line() -> None:
    class Chosen(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).argmax(-1)

    class Half(Chosen):
        def forward(self, x: Tensor) -> Tensor:
            return self.body[4:](self.body[:4](x.bfloat16()).float())

    half = conv()
    half[:4].bfloat16()
    for model, told in (
        (Chosen(conv()), "no gradient gets from the model's output"),
        (Half(half), "does not run in it"),
    ):
        small = modhifi.prune(model.eval(), pixels(), ratio=0.5, **FEW).model
        with pytest.raises(ModhifiError, match=told):
            modhifi.heal(small, pixels(), against=model, steps=1, **FEW)


def test_what_a_format_does_not_take_is_told_before_the_run(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    for model, told in ((conv().bfloat16(), "takes weights in float32, and this model has bfloat16"), (Both(), "")):
        several_inputs = isinstance(model, Both)
        loaded = load_model(model, example=several(2) if several_inputs else pixels(2))
        items: Any = [*zip(*several(80), strict=True)] if several_inputs else pixels()
        with pytest.raises(ModhifiError, match=told or "has one input, and this model reads several"):
            modhifi.prune(loaded, items, ratio=0.5, out=tmp_path / "out", export=("onnx",), **FEW)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("classes", [1, 5])
def test_classes_of_a_one_dimensional_convolution_stand_on_axis_one(classes: int) -> None:
    """As losses of torch read them; the same network with its output turned is measured alike."""

    class Turned(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).mT.contiguous()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 24, 5, padding=2), nn.ReLU(), nn.Conv1d(24, classes, 5, padding=2)).eval()
    items = torch.randn(60, 1, 40)
    first, second = (modhifi.prune(model, items, ratio=0.5, **FEW).report for model in (net, Turned(net)))
    assert first["values"] is second["values"] is (classes == 1)
    assert first["before_after"][0] == second["before_after"][0]
    assert first["errors"].get("agreement") == second["errors"].get("agreement")


@pytest.mark.parametrize("end", [lambda y: y > 0, lambda y: torch.complex(y, y)], ids=["bool", "complex"])
def test_outputs_of_which_nothing_is_largest_are_counted(end: Callable[[Tensor], Tensor]) -> None:
    class Ending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv()

        def forward(self, x: Tensor) -> Tensor:
            return end(self.body(x))

    report = modhifi.prune(Ending().eval(), pixels(), ratio=0.5, **FEW).report
    assert any("of which nothing is largest" in verdict["text"] for verdict in report["verdicts"])


class Block(nn.Module):
    """A residual block that looks at the tokens beside where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor, beside: bool) -> Tensor:
        y = self.norm(x)
        if beside:
            y = y.roll(1, 1) + y.mean(1, keepdim=True)
        return x + self.down(self.up(y).relu())


class Alternating(nn.Module):
    """Every second block looks beside, by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = block(x, number % 2 == 1)
        return self.last(x.mean(1))


def test_blocks_that_count_by_their_number_stay() -> None:
    torch.manual_seed(0)
    items, method = torch.randn(80, 10, 16), {"only": ["blocks"], "round_to": 1}
    with pytest.raises(ModhifiError, match="'blocks': once it is cut, the model computes something else on the samp"):
        modhifi.prune(Alternating().eval(), items, ratio=0.25, method=method, **FEW)


def test_what_other_samples_run_is_not_cut_away() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.middle, self.route = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(16, 8)
            self.ends = nn.ModuleList(nn.Linear(32, 5) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            hidden, chosen = self.middle(self.stem(x).relu()).relu(), self.route(x).argmax(-1)
            out = hidden.new_zeros(len(x), 5)
            for number, end in enumerate(self.ends):
                if (chosen == number).any():
                    out[chosen == number] = end(hidden[chosen == number])
            return out

    torch.manual_seed(0)
    small = modhifi.prune(Routed().eval(), torch.randn(80, 16), ratio=0.3, **FEW)
    assert small.model is not None and small.model.stem.out_features < 32 and small.model.middle.out_features == 32
    assert any("the group 'middle' stays as it is: once it is cut" in told for told in small.report["warnings"])


@pytest.mark.parametrize("given", [2, "2", np.int64(2), torch.tensor(2), [2], np.array([2]), torch.tensor([2])])
def test_classes_may_be_numbers_of_any_kind(given: Any) -> None:
    assert _classes(given) == ["2"]


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_a_program_has_switched_on_changes_nothing(mode: Callable[[], Any]) -> None:
    plain = modhifi.prune(conv(), pixels(), ratio=0.5, **FEW)
    model, items = conv(), pixels()
    with mode():
        small = modhifi.prune(model, items, ratio=0.5, **FEW)
    assert small.report["errors"] == plain.report["errors"]
    assert small.model is not None and small.model.requires_grad_(True)(items[:2]).requires_grad


def test_an_encoder_of_torch_with_a_padding_mask_is_pruned_and_healed() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
            self.encoder, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(24, 5)

        def forward(self, x: Tensor, pad: Tensor) -> Tensor:
            return self.out(self.encoder(x, src_key_padding_mask=pad)[:, 0])

    torch.manual_seed(0)
    items = [{"x": torch.randn(10, 24), "pad": torch.arange(10) >= 5 + i % 6} for i in range(64)]
    model = Encoder().eval()
    small = modhifi.prune(model, items, ratio=0.5, **FEW)
    assert small.model is not None and small.model.encoder.layers[1].linear1.out_features < 48
    healed = modhifi.heal(small.model, items, against=model, steps=1, **FEW)
    assert healed.model is not None and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("target", [torch.zeros(8, 8, dtype=torch.int64), {"boxes": torch.zeros(2, 4)}, "a name"])
def test_targets_that_no_input_is_for_are_left_out(target: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    items = [(image, target) for image in pixels()]
    if isinstance(target, str):
        with pytest.raises(ModhifiError, match="give class indices"):
            modhifi.prune(net, items, ratio=0.5, **FEW)
    else:
        report = modhifi.prune(net, items, ratio=0.5, **FEW).report
        assert report["errors"] == modhifi.prune(net, pixels(), ratio=0.5, **FEW).report["errors"]


def test_dropout_that_stays_on_is_no_reason_to_stay_wide() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(24, 48), nn.Linear(48, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.dropout(self.first(x).relu(), 0.2, training=True)
            return self.third(self.second(hidden).relu())

    torch.manual_seed(0)
    small = modhifi.prune(Dropping().eval(), torch.randn(80, 24), ratio=0.5, **FEW)
    assert small.model is not None and small.model.first.out_features < 48 and small.model.second.out_features < 32
