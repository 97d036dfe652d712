"""Networks of diffusers: heads, neurons, whole groups of GroupNorms, over the steps that sampling takes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modhifi.models.load import load_model
from modhifi.pruning.stages import find_structure
from modhifi.structure.outputs import difference
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink

pytestmark = pytest.mark.slow  # to import diffusers alone takes seconds
PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def unet(diffusers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    blocks: dict[str, Any] = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), block_out_channels=(16, 32))
    blocks |= dict(up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4)
    model = diffusers.UNet2DModel(sample_size=16, **blocks, num_class_embeds=5)
    times = torch.tensor([3, 700])
    return model, {"sample": torch.randn(2, 3, 16, 16), "timestep": times, "class_labels": torch.tensor([0, 4])}


def dit(diffusers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes: dict[str, Any] = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8)
    model = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, **sizes, num_embeds_ada_norm=10)
    times = torch.tensor([3, 8])
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": times, "class_labels": torch.tensor([0, 4])}


def crossed(diffusers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes: dict[str, Any] = dict(num_attention_heads=4, attention_head_dim=8, num_layers=1, cross_attention_dim=16)
    model = diffusers.Transformer2DModel(in_channels=32, **sizes, norm_num_groups=4)
    return model, {"hidden_states": torch.randn(2, 32, 4, 4), "encoder_hidden_states": torch.randn(2, 5, 16)}


@pytest.mark.parametrize(("build", "kinds"), [(unet, {"heads", "channels"}), (dit, {"heads"}), (crossed, {"heads"})])
def test_networks_of_diffusers_pass_the_mask_oracle(build: Any, kinds: set[str]) -> None:
    torch.manual_seed(0)
    model, batch = build(pytest.importorskip("diffusers"))
    for parameter in model.parameters():  # some begin at zero
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    loaded = load_model(model.eval().requires_grad_(False), example=batch)
    structure = find_structure(loaded)
    assert kinds | {"neurons"} == {g.kind for g in structure.prunable}
    if build is unet:  # of 32 channels in groups of 8 that are normalised together
        inner = next(g for g in structure.prunable if g.name == "mid_block.resnets.0.conv1")
        assert (inner.n, inner.producers[0].index.shape) == (4, (4, 8))
    plan = Plan({g.name: tuple(range(g.n // 2)) for g in structure.prunable})
    dense = loaded.model.double()
    with torch.no_grad():
        masked = loaded.outputs(loaded.example, mask_readers(dense, structure, plan))
        small = loaded.outputs(loaded.example, shrink(copy.deepcopy(dense), structure, plan))
        whole = loaded.outputs(loaded.example, dense)
    assert all(difference(small[name], masked[name]) < 1e-9 for name in masked)
    assert all(difference(whole[name], masked[name]) > 1e-3 for name in masked)


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.S) if "diffusers" in b)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    small, again = names["small"], names["again"]
    assert sum(p.numel() for p in small.model.parameters()) < sum(p.numel() for p in names["unet"].parameters())
    inputs = {name: value[None] for name, value in names["items"][0].items()}
    assert torch.equal(again(**inputs).sample, small.model(**inputs).sample)
