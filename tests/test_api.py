"""The Python functions: their docstrings' examples, and models and data that a program holds."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import modhifi
from modhifi import api
from modhifi.data import in_memory
from modhifi.errors import ModhifiError
from modhifi.models import artifact
from modhifi.pruning.selectors import SELECTORS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_selectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(SELECTORS, "entries", dict(SELECTORS))


VERBS = {"audit", "compare", "prune", "score", "unlearn", "verify"}
HOOKS = {"register_operation", "register_selector"}


# Those that take longest.
SLOW = {"audit", "compare", "unlearn"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in sorted(VERBS | HOOKS)]
)
def test_the_examples_run(name: str) -> None:
    (found,) = doctest.DocTestFinder().find(getattr(modhifi, name), name, module=False, globs={})
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0


def test_the_functions_are_public() -> None:
    assert VERBS | HOOKS | {"load", "load_model"} <= set(dir(modhifi))
    assert modhifi.verify is api.verify and modhifi.load is artifact.load and modhifi.unlearn is api.unlearn


def test_a_selector_of_ones_own_has_a_name_of_its_own_and_gives_every_component_once() -> None:
    with pytest.raises(ModhifiError, match="there is a selector 'cholesky' already"):
        modhifi.register_selector("cholesky", lambda readers, seed: None)
    modhifi.register_selector("short", lambda readers, seed: torch.arange(3))
    with pytest.raises(ModhifiError, match="there is a selector 'short' already; give another name"):
        modhifi.register_selector("short", lambda readers, seed: None)
    with pytest.raises(ModhifiError, match="all 8 components of the group once each"):
        modhifi.prune(net(), torch.randn(32, 3, 8, 8), ratio=0.4, samples=16, method={"selector": "short"})


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def test_a_module_and_a_dataset_of_ones_own(tmp_path: Path) -> None:
    module, x = net(), torch.randn(48, 3, 8, 8)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    pairs = torch.utils.data.TensorDataset(x, torch.arange(48) % 4)
    result = modhifi.prune(
        module, pairs, ratio=0.4, samples=24, evaluation_samples=16, checks={"walked": 2}, out=tmp_path / "small"
    )
    assert module.training and all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert result.report["errors"]["accuracy_before"] is not None
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in module.parameters())
    again = modhifi.load(tmp_path / "small", skeleton=module)
    assert torch.equal(again(x[:4]), result.model(x[:4]))
    assert len(modhifi.score(module, x, samples=16)) == 2
    found = modhifi.verify(result.model, x, against=module, max_flip=1.0)
    assert [v.verdict for v in found.verdicts][1:] == ["PASS-STATISTICAL"]


def test_pictures_are_prepared_by_the_model(image_dir: Path, model_dir: Path) -> None:
    pictures = [Image.open(p) for p in sorted(image_dir.rglob("*.png"))[:24]]
    result = modhifi.prune(model_dir, pictures, flops="0.7x", samples=16, evaluation_samples=8, checks={"walked": 0})
    assert result.report["data"]["calibration_samples"] == 16 and result.path is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no items"),
        (["a", "b"], "unknown data source 'a'"),
        ({"a": 1}, "is dict"),
        ([(torch.zeros(3, 8, 8), 1), torch.ones(3, 8, 8)], "all of them one"),
        ([Image.new("RGB", (8, 8))] * 4, "no preprocessing"),
        ([(torch.zeros(3, 8, 8), "cat")], "label of item 0 of the data is 'cat'"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], "items of one shape"),
    ],
)
def test_bad_data(data: object, message: str) -> None:
    loaded = modhifi.load_model(net(), example=torch.randn(2, 3, 8, 8))
    with pytest.raises(ModhifiError, match=message):
        modhifi.score(loaded, data)  # type: ignore[arg-type]


def test_items_are_chosen_by_the_seed_and_equal_ones_once() -> None:
    items = [torch.full((2,), float(i % 5)) for i in range(20)]
    first, again, other = (in_memory.from_items(items, None, n=4, seed=s) for s in (0, 0, 1))
    assert len(in_memory.from_items(items, None, n=20, seed=0)) == 5
    assert first.hashes == again.hashes != other.hashes
    assert torch.equal(first.load(0), again.load(0))


def test_a_sampler_says_that_its_items_are_drawn() -> None:
    class Sampler(list[torch.Tensor]):
        synthetic = True

    items = [torch.randn(2) for _ in range(3)]
    assert in_memory.from_items(Sampler(items), None, n=3, seed=0).synthetic
    assert not in_memory.from_items(items, None, n=3, seed=0).synthetic


def test_a_module_needs_tensors_and_the_demo_has_names() -> None:
    with pytest.raises(ModhifiError, match="needs tensors"):
        modhifi.prune(net(), ratio=0.5)
    with pytest.raises(ModhifiError, match="brings demo:resnet"):
        modhifi.prune("demo:nothing", ratio=0.5)
    with pytest.raises(ModhifiError, match="brings demo:calibration and demo:test"):
        modhifi.prune("demo:resnet", "demo:nothing", ratio=0.5)


def test_half_precision_and_tensors_with_gradients(tmp_path: Path) -> None:
    x = torch.randn(40, 3, 8, 8, requires_grad=True)
    result = modhifi.prune(net().bfloat16(), x, ratio=0.4, samples=24, checks={"walked": 0}, out=tmp_path / "small")
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    before, after = result.report["size"]["flops"]
    assert after < before


def test_a_layer_called_by_keyword_and_an_output_of_one_number() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(input=self.first(x).relu()).squeeze(1)

    result = modhifi.prune(Named(), torch.randn(64, 6), ratio=0.5, samples=40, checks={"walked": 0})
    assert result.model(torch.randn(5, 6)).shape == (5,)
    assert result.report["size"]["parameters"][1] < result.report["size"]["parameters"][0]


def test_a_model_of_a_library_changed_by_hand_is_saved_with_its_skeleton(tmp_path: Path, model_dir: Path) -> None:
    model = modhifi.load_model(model_dir).model
    model.fc = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(24, 3, 32, 32)
    result = modhifi.prune(model, x, ratio=0.3, samples=16, checks={"walked": 0}, out=tmp_path / "small")
    again = modhifi.load(tmp_path / "small", skeleton=model)
    assert torch.equal(again(x[:4]), result.model(x[:4]))


def test_classes_are_forgotten_with_held_out_tensors_and_any_size_of_example() -> None:
    module, x = net().eval(), torch.randn(600, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    head = module[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        logits = module(x)
        head.weight.mul_(4 / logits.std(0)[:, None])
        head.bias.copy_(-4 * (logits.mean(0) - head.bias) / logits.std(0))  # sure of every class now and then
    loaded = modhifi.load_model(module, example=x[:8])
    result = modhifi.unlearn(
        loaded, x[:300], forget=1, evaluate=x[300:], samples=300, evaluation_samples=300, checks={"walked": 0}
    )
    rows = result.report["audit"]["rows"]
    assert rows["edited"]["forget"] < rows["original"]["forget"]
