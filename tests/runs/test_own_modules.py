"""Whole runs on modules of a program's own that are made in unusual ways: prune, save, load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from timm.models import FeatureGraphNet
from tiny import Forgetful, Net, Plain, Residual, conv_bn
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.feature_extraction import create_feature_extractor

import modhifi
from modhifi.models.load import load_model
from modhifi.models.loaded import main_output
from modhifi.pruning.stages import find_structure
from modhifi.runs.inputs import Given
from modhifi.runs.recipes.tasks import parse
from modhifi.runs.run_recipe import run_recipe
from modhifi.runs.run_task import Circumstances

PIXELS = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, 50, (20, 12), generator=torch.Generator().manual_seed(0))
SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)
SPEECH = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=40, decoder_ffn_dim=40)


class Copied(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.conv, self.flat = conv_bn(8, 6), Forgetful()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.conv(self.stem(x)).mean((2, 3), keepdim=True)))


class Alias(Net):
    """One layer under two names, run once under each, or under the second alone."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b, self.c, self.twice = self.a, nn.Conv2d(8, 8, 1), twice

    def body(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu() if self.twice else self.b(x).relu())


class AliasedBlock(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv_bn(8, 12), nn.Conv2d(12, 8, 1))
        self.blocks = nn.ModuleList([self.block, self.block])

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Around(nn.Module):
    """A module of one's own around a model of transformers, which has a configuration where this one has none."""

    def __init__(self, net: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.net, x)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4)
    return Around(transformers.T5Model(config), lambda net, x: net(x, decoder_input_ids=x).last_hidden_state)


def bert() -> nn.Module:
    net = transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL))
    return Around(net, lambda net, x: net(x).last_hidden_state.mean(1))


def whisper() -> nn.Module:
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=3, max_source_positions=8)
    tokens = dict(vocab_size=50, pad_token_id=1, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    net = transformers.WhisperModel(transformers.WhisperConfig(**SPEECH, **heads, **tokens))
    ids = torch.arange(4)
    return Around(net, lambda net, x: net(x[:, :, 0], decoder_input_ids=ids.expand(len(x), 4)).last_hidden_state)


def clip() -> nn.Module:
    vision, text = SMALL | dict(image_size=16, patch_size=8), SMALL | dict(vocab_size=50, max_position_embeddings=16)
    net = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    return Around(net, lambda net, x: net.get_image_features(pixel_values=x).pooler_output)


def extractor() -> nn.Module:
    net = nn.Sequential(conv_bn(3, 8), conv_bn(8, 12), conv_bn(12, 8))
    return create_feature_extractor(net, {"1.2": "middle", "2.2": "end"})


def resnet_features() -> nn.Module:
    return create_feature_extractor(torchvision.models.squeezenet1_1(), {"features.4": "out"})


def rearranged() -> nn.Module:
    torch_layers = pytest.importorskip("einops.layers.torch")
    pool = torch_layers.Reduce("b c h w -> b c", "mean")
    return nn.Sequential(conv_bn(3, 8), conv_bn(8, 6), pool, nn.Linear(6, 5))


def graph_features() -> nn.Module:
    return FeatureGraphNet(timm.create_model("resnet18", channels=(8, 8, 8, 8)), (0, 1))


def normed() -> nn.Module:
    net = Plain()
    net.conv[0] = parametrizations.weight_norm(net.conv[0])
    return net


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "forgets its mode": (Copied, PIXELS),
    "graph": (lambda: torch.fx.symbolic_trace(Residual().eval()), PIXELS),
    "feature extractor": (extractor, PIXELS),
    "torchvision": (resnet_features, PIXELS),
    "timm's graph": (graph_features, PIXELS),
    "einops": (rearranged, PIXELS),
    "one layer twice": (lambda: Alias(True), PIXELS),
    "one layer, two names": (lambda: Alias(False), PIXELS),
    "one block, three names": (AliasedBlock, PIXELS),
    "around T5": (t5, IDS),
    "around BERT": (bert, IDS),
    "around Whisper": (whisper, PIXELS),
    "around CLIP": (clip, PIXELS),
    "weight_norm": (normed, PIXELS),
    "compiled": (lambda: torch.compile(Plain(), backend="eager"), PIXELS),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_is_pruned_saved_and_loaded(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, data = CASES[case]
    module = make()
    loaded = load_model(module, example=data[:2])
    structure = find_structure(loaded)
    assert structure.prunable
    plan = {g.name: list(range(g.n - g.step * max(1, g.n // 4 // g.step))) for g in structure.prunable}
    recipe = {
        "model": {"name": loaded.source},
        "data": {"source": "python:Tensor", "samples": 16, "evaluation_samples": 4},
        "checks": {"walked": 0},
        "plan": plan,
        "batch_size": 8,
        "out": str(tmp_path / "small"),
    }
    (done,) = run_recipe(parse(recipe), Circumstances(given=Given(loaded, data)))
    small = done.result.model
    assert done.report["size"]["parameters"][1] < done.report["size"]["parameters"][0]
    again = modhifi.load(tmp_path / "small", skeleton=module)
    assert not any(m.training for m in [*small.modules(), *again.modules()])
    with torch.inference_mode():
        assert torch.equal(main_output(again(data)), main_output(small(data)))
