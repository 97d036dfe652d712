from __future__ import annotations

import pytest
import tiny_transformers
import torch

from modhifi.calibration.collect import collect
from modhifi.calibration.moments import FEW, Moments
from modhifi.calibration.sampling import Sampling
from modhifi.pruning.readers import applied_second
from modhifi.structure.operators import operator_modules
from modhifi.structure.places import operator_at
from modhifi.structure.tracing.tracer import trace


def moments_of(name: str, implementation: str) -> tuple[torch.nn.Module, torch.Tensor, dict[str, Moments]]:
    model, batch, run = tiny_transformers.family(name)
    model = model.float()
    model.config._experts_implementation = implementation
    structure = trace(model, run)
    groups = [g for g in structure.prunable if g.experts > 1]
    found = collect(model, model, [batch], dict(operator_modules(model, groups)), Sampling(), samples=2)
    return model, batch, found


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_each_experts_gram_is_that_of_its_tokens_weighted_by_their_gates(name: str, implementation: str):
    """Against brute force: every expert's own code on the tokens that the router sends to it."""
    model, batch, found = moments_of(name, implementation)
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    handles = [
        model.get_submodule(reader.rpartition(".experts.")[0] + ".experts").register_forward_pre_hook(
            lambda _, args, reader=reader: seen.__setitem__(reader, args)
        )
        for reader in found
    ]
    model(batch)
    for handle in handles:
        handle.remove()
    for reader, moments in found.items():
        experts = model.get_submodule(reader.rpartition(".experts.")[0] + ".experts")
        tokens, chosen, gates = seen[reader]
        up = operator_at(model, reader.replace("down_proj", "gate_up_proj")).matrices
        bias = getattr(experts, "gate_up_proj_bias", torch.zeros(up.shape[:2]))
        for expert in range(len(up)):
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            hidden = tokens[rows] @ up[expert].T + bias[expert]
            if hasattr(experts, "_apply_gate"):
                hidden = experts._apply_gate(hidden)
            else:
                gate, value = hidden.chunk(2, dim=-1)
                hidden = experts.act_fn(gate) * value
            weighted = (hidden * gates[rows, places, None]).double()
            torch.testing.assert_close(moments.gram[expert], weighted.T @ weighted / len(tokens), rtol=1e-4, atol=1e-6)
            assert int(moments.counts[expert]) == len(rows)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_padding_is_masked_out_of_each_experts_gram(implementation: str):
    model, batch, run = tiny_transformers.family("mixtral")
    model = model.float()
    model.config._experts_implementation = implementation
    structure = trace(model, run)
    readers = dict(operator_modules(model, [g for g in structure.prunable if g.experts > 1]))
    half = batch.shape[1] // 2
    keep = (torch.arange(batch.shape[1]) < half).expand(batch.shape)  # a causal model does not see what comes later
    masked = collect(model, model, [batch], readers, Sampling(), samples=2, real=lambda batch: keep)
    alone = collect(model, model, [batch[:, :half]], readers, Sampling(), samples=2)
    for name, moments in masked.items():
        assert moments.n == alone[name].n and torch.equal(moments.counts, alone[name].counts)
        torch.testing.assert_close(moments.gram, alone[name].gram, rtol=1e-4, atol=1e-7)


def test_experts_that_saw_few_tokens_have_the_identity_for_a_gram():
    second = torch.randn(3, 8, 8, dtype=torch.float64)
    second = second @ second.mT
    second[2] = 0
    seen = torch.tensor([100, int(FEW * 8) - 1, 0])
    moments = Moments(100, torch.zeros(3, 8, dtype=torch.float64), second, seen)
    assert moments.few.tolist() == [False, True, True]
    applied = applied_second(moments, None)
    assert not torch.equal(applied[0], torch.diag(applied[0].diagonal()))
    for few in applied[1:]:
        assert torch.equal(few, few[0, 0] * torch.eye(8, dtype=torch.float64)) and few[0, 0] > 0
