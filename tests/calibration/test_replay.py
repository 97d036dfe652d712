import copy

import pytest
import timm
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modhifi.calibration.replay import Replay


def resnet() -> tuple[nn.Module, torch.Tensor]:
    return timm.create_model("resnet18", num_classes=4, zero_init_last=False), torch.randn(2, 3, 32, 32)


def vit() -> tuple[nn.Module, torch.Tensor]:
    options = dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=4)
    return timm.create_model("vit_tiny_patch16_224", **options), torch.randn(2, 3, 16, 16)


def llama() -> tuple[nn.Module, torch.Tensor]:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config), torch.randint(0, 32, (2, 5))


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return found.logits if hasattr(found, "logits") else found


@pytest.mark.parametrize("build", [resnet, vit, llama])
def test_replay_gives_what_a_full_pass_gives_and_skips_the_blocks_before(build):
    torch.manual_seed(0)
    model, x = build()
    model.eval()
    replay = Replay(model)
    with replay.recording():
        dense = output(model, x)
    blocks = replay.blocks()
    assert len(blocks) >= 3
    changeable = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for place in (changeable[0], changeable[len(changeable) // 2], changeable[-1]):
        weight = model.get_submodule(place).weight
        before = weight.detach().clone()
        weight.data.mul_(1.5)
        expected = output(copy.deepcopy(model), x)
        ran = []
        handles = [
            module.register_forward_pre_hook(lambda m, a, name=name, ran=ran: ran.append(name))
            for name, module in model.named_modules()
        ]
        with replay.after_change([place]):
            found = output(model, x)
        for handle in handles:
            handle.remove()
        weight.data.copy_(before)
        assert torch.equal(found, expected) and not torch.equal(found, dense)
        inside = [b for b in blocks if f"{place}.".startswith(f"{b}.")]
        skipped = list(blocks)[: list(blocks).index(inside[0])] if inside else []
        assert not [n for n in ran for b in skipped if n.startswith(f"{b}.")]
    assert torch.equal(output(model, x), dense)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_shared_block_is_computed_again():

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Wrapper(), Wrapper()])
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            for layer in (*self.layers, self.layers[0]):
                x = layer(x)
            return self.head(x)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x).relu()

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 3)
    replay = Replay(model)
    with replay.recording():
        output(model, x)
    model.layers[1].linear.weight.data.mul_(2)
    expected = output(model, x)
    with replay.after_change(["layers.1.linear"]):
        assert torch.equal(output(model, x), expected)
