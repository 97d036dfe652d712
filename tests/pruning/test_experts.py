from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_transformers
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

import modhifi
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.skeleton import own_config
from modhifi.models.stock import stating
from modhifi.pruning.expert_removal import expert_structure, surviving
from modhifi.pruning.experts import EXPERT_SELECTORS
from modhifi.pruning.experts.block import Block
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink


class WithoutExperts(TorchFunctionMode):
    """Full-size routers whose scores of some experts are minus infinity, so that they are never chosen.

    Inside, softmaxes compute in float64.
    """

    def __init__(self, model: nn.Module, removed: list[int]) -> None:
        super().__init__()
        self.removed = removed
        self.routers = {
            id(p) for name, p in model.named_parameters() if name.endswith((".gate.weight", ".router.weight"))
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:  # the tests' models are float64 all through
            kwargs = kwargs | {"dtype": torch.float64}
        out = func(*args, **kwargs)
        if func is nn.functional.linear and any(id(t) in self.routers for t in args):
            out[..., self.removed] = -torch.inf
        return out


@pytest.mark.parametrize("name", tiny_transformers.MIXTURES)
def test_a_mixture_without_some_experts_is_one_that_never_chooses_them(name: str):
    model, _, run = tiny_transformers.family(name)
    loaded = load_model(model)
    structure, found = expert_structure(loaded)
    assert len(found) == (1 if name in ("llama4", "deepseek_v3") else 2)
    small = shrink(copy.deepcopy(model), structure, Plan({m.group.name: (0, 2, 3) for m in found}))
    if name == "deepseek_v3":  # which adds a correction to what its router says, and computes it in float32
        for mixture in found:
            model.get_submodule(mixture.block).gate.e_score_correction_bias[1] = -torch.inf
    with torch.no_grad(), WithoutExperts(model, [] if name == "deepseek_v3" else [1]):
        expected = run(model)
    tolerance = 1e-6 if name == "deepseek_v3" else 1e-9
    with torch.no_grad(), WithoutExperts(small, []):
        torch.testing.assert_close(run(small), expected, rtol=tolerance, atol=tolerance)
    config = stating(small, loaded).config
    assert config.get_text_config().to_dict()[EXPERTS_FIELD.get(name, "num_local_experts")] == 3


EXPERTS_FIELD = {"qwen2_moe": "num_experts", "deepseek_v3": "n_routed_experts"}


def block_of(name: str = "mixtral") -> Block:
    model, _, _ = tiny_transformers.family(name)
    loaded = load_model(model)
    _, (mixture, *_) = expert_structure(loaded)
    x = torch.randn(96, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return Block(mixture, loaded.model.get_submodule(mixture.block), x, 1e-4)


@pytest.mark.parametrize("selector", EXPERT_SELECTORS)
def test_every_selector_of_experts_gives_one_number_an_expert(selector: str):
    block = block_of()
    worth = EXPERT_SELECTORS[selector].worth(block, torch.ones(4, dtype=torch.bool), 0)
    assert worth.shape == (4,) and not worth.isnan().any() and bool((worth < torch.inf).any())
    stay = surviving(block, 0.75, PruneSettings(experts=selector))
    assert int(stay.sum()) == 3 and not stay[int(worth.argmin())]
    assert int(surviving(block, 0.1, PruneSettings(experts=selector)).sum()) == 2  # as many as a token has


def test_reap_and_frequency_against_every_token_by_hand():
    block = block_of()
    experts = block.module.experts
    _, gates, chosen = block.module.gate(block.x)
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for token, (weights, numbers) in enumerate(zip(gates, chosen, strict=True)):
        for weight, number in zip(weights, numbers.tolist(), strict=True):
            gate, up = (experts.gate_up_proj[number] @ block.x[token]).chunk(2)
            out = experts.down_proj[number] @ (experts.act_fn(gate) * up)
            sums[number] += float(weight * out.norm())
            counts[number] += 1
    there = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(EXPERT_SELECTORS["frequency"].worth(block, there, 0), counts)
    torch.testing.assert_close(EXPERT_SELECTORS["reap"].worth(block, there, 0), sums / counts)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_fitted_matrices_are_those_of_least_squares(name: str):
    """With one expert left all tokens are its own: one sweep is the damped least-squares solution itself."""
    block = block_of(name)
    block.ridge = 1e-9
    there = torch.tensor([False, True, True, False])
    small = block.keeping(there)
    before = block.error(small)
    block.fit(small)
    after = block.error(small)
    assert after < before
    _, read = block.read(small)
    design = torch.zeros(96, 2, read.rows.shape[1], dtype=torch.float64)
    design[read.tokens, read.experts] = read.weighted
    target = block.y - (block.run(small) - torch.einsum("ted,eod->to", design, block.stack(small).matrices))
    best = torch.linalg.lstsq(design.flatten(1), target).solution
    floor = float((design.flatten(1) @ best - target).square().sum(1).mean())
    assert floor <= after + 1e-12 and (after - floor) < 0.5 * (before - floor)


def test_a_whole_run_gives_what_stock_transformers_builds_from_its_configuration():
    model, _, _ = tiny_transformers.family("mixtral")
    tokens = torch.randint(3, 50, (32, 12), generator=torch.Generator().manual_seed(0))
    result = modhifi.prune(model.float(), tokens, experts="0.75x", samples=24, checks={"walked": 0})
    assert all(group["kept"] == 3 and 0 < group["relative_error"] < 1 for group in result.report["groups"])
    assert result.model is not None and result.model.config.num_local_experts == 3
    stock = transformers.MixtralForCausalLM(own_config(result.model)).eval()
    stock.load_state_dict(result.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, result.model(tokens).logits)


def test_a_model_without_experts_is_refused_in_one_line():
    model, _, _ = tiny_transformers.family("llama")
    with pytest.raises(ModhifiError, match="no mixture of experts"):
        modhifi.prune(model.float(), torch.randint(3, 50, (16, 12)), experts="0.5x", samples=8)
