from __future__ import annotations

from pathlib import Path

import pytest
import tiny_transformers
import torch
from tiny_values import grouped
from torch import Tensor

import modhifi
from modhifi.calibration.moments import Moments, Spanned
from modhifi.data.in_memory import from_items
from modhifi.errors import IndefiniteError
from modhifi.models.load import load_model
from modhifi.models.manifest import read_manifest
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model
from modhifi.pruning.rank_basis import in_leading_basis, leading_basis
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import choose_groups, find_structure, measure_moments

HEADS, ROWS, OUT, N = 3, 50, 7, 5


def head_of_each() -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``(H, ROWS, N)`` of unequal power, what reads them ``(H, OUT, N)``, and their second moments."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(HEADS, ROWS, N, dtype=torch.float64, generator=generator) @ torch.randn(
        HEADS, N, N, dtype=torch.float64, generator=generator
    )
    weight = torch.randn(HEADS, OUT, N, dtype=torch.float64, generator=generator)
    return rows, weight, rows.mT @ rows / ROWS


def lost(rows: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    """``E‖W (y − P y)‖²`` of every head, from the raw rows."""
    return ((rows - rows @ projection.mT) @ weight.mT).square().sum((1, 2)) / ROWS


@pytest.mark.parametrize("rank", range(N + 1))
def test_the_first_ranks_lose_the_squares_of_the_singular_values_that_are_dropped(rank: int):
    rows, weight, second = head_of_each()
    turns, back = leading_basis(weight, second)
    error = lost(rows, weight, back[:, :, :rank] @ turns[:, :rank])
    singular = torch.linalg.svdvals(rows @ weight.mT)  # Eckart-Young: no matrix of that rank is nearer
    torch.testing.assert_close(error, singular[:, rank:].square().sum(1) / ROWS, rtol=1e-10, atol=1e-12)


def test_all_ranks_are_exact_and_have_unit_power():
    rows, weight, second = head_of_each()
    turns, back = leading_basis(weight, second)
    identity = torch.eye(N, dtype=torch.float64).expand(HEADS, N, N)
    torch.testing.assert_close(back @ turns, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(turns @ second @ turns.mT, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_neither_channels_nor_the_product_alone_lose_less(rank: int):
    rows, weight, second = head_of_each()
    turns, back = leading_basis(weight, second)
    least = lost(rows, weight, back[:, :, :rank] @ turns[:, :rank])
    plain = torch.linalg.svd(weight).Vh[:, :rank]
    assert bool((least < lost(rows, weight, plain.mT @ plain)).all())
    for kept in torch.combinations(torch.arange(N), rank):
        diagonal = torch.zeros(N, dtype=torch.float64).index_fill_(0, kept, 1).diag().expand(HEADS, N, N)
        assert bool((least < lost(rows, weight, diagonal)).all())


def test_a_head_without_power_has_a_basis_and_one_without_a_factor_is_an_error():
    _, weight, second = head_of_each()
    second[1] = 0
    turns, back = leading_basis(weight, second, ridge=1e-4)
    torch.testing.assert_close(back @ turns, torch.eye(N, dtype=torch.float64).expand(HEADS, N, N))
    second[2] = -second[2]
    with pytest.raises(IndefiniteError):
        leading_basis(weight, second, ridge=1e-4)


@pytest.mark.parametrize("spanned", [False, True])
@pytest.mark.parametrize("name", ["own", "deepseek_v3"])
def test_the_turned_model_is_the_same_function_and_its_moments_are_those_measured_anew(name: str, spanned: bool):
    if name == "own":
        model, items = grouped()
    else:
        model, _, _ = tiny_transformers.family(name)
        items = torch.randint(3, 50, (24, 9), generator=torch.Generator().manual_seed(3))
    loaded = load_model(model, example=items[:2])
    samples, settings = (
        from_items(items, None, n=len(items), seed=0),
        PruneSettings(only=("ranks",), rows_per_column=None),
    )
    structure = choose_groups(find_structure(loaded, on_request=True), settings)
    moments = measure_moments(loaded, structure, samples, settings.sampling)
    if spanned:
        moments = {name: held_as_rows(own) for name, own in moments.items()}
    turned, known = in_leading_basis(loaded, structure, moments, settings.ridge)
    torch.testing.assert_close(turned.logits(items), loaded.logits(items), rtol=1e-9, atol=1e-9)
    written = f"{structure.prunable[0].producers[0].module}.weight"
    assert not torch.allclose(turned.model.get_parameter(written), model.get_parameter(written))
    anew = measure_moments(turned, structure, samples, settings.sampling)
    for reader, own in known.items():
        torch.testing.assert_close(own.mean, anew[reader].mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.gram, anew[reader].gram, rtol=1e-4, atol=1e-4)


def held_as_rows(moments: Moments) -> Spanned:
    """Rows with the given mean and covariance."""
    values, vectors = torch.linalg.eigh(moments.cov)
    half = vectors * (values.clamp_min(0) * moments.cov.shape[-1]).sqrt()[:, None]
    return Spanned(torch.cat([half, -half], 2) + moments.mean[:, :, None])


@torch.no_grad()
def test_a_run_drops_the_last_ranks_and_loses_less_than_any_channels_would():
    model, _, _ = tiny_transformers.family("deepseek_v3")
    loaded, items = load_model(model), torch.randint(3, 50, (16, 9), generator=torch.Generator().manual_seed(3))
    settings = PruneSettings(
        "magnitude", "none", layout="uniform", weighting="energy", rows_per_column=None, only=("ranks",)
    )
    pruned = prune_model(loaded, from_items(items, None, n=16, seed=0), Budget.parse(ratio="0.5"), settings)
    assert len(pruned.plan.kept) == 2 and set(pruned.plan.kept.values()) == {(0, 1, 2, 3)}
    for error in pruned.errors:
        reader, rows = model.get_submodule(error.reader), []
        handle = reader.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))  # noqa: B023
        model(items)
        handle.remove()
        for removed in torch.combinations(torch.arange(8), 4):
            columns = (removed + 8 * torch.arange(4)[:, None]).flatten()
            lost = rows[0][:, columns] @ reader.weight[:, columns].T
            assert error.error < float(lost.square().sum(1).mean())


@pytest.mark.slow
def test_fewer_ranks_everywhere_load_with_stock_transformers_in_a_fresh_process(tmp_path: Path):
    model, _, _ = tiny_transformers.family("deepseek_v3")
    items = torch.randint(3, 50, (24, 9), generator=torch.Generator().manual_seed(3))
    settings = {"only": ["ranks"], "layout": "uniform"}
    amounts = {"samples": 16, "evaluation_samples": 8, "checks": {"walked": 2}}
    run = modhifi.prune(model.float(), items, ratio=0.5, method=settings, out=tmp_path / "small", **amounts)
    entry = read_manifest(tmp_path / "small").model
    assert entry.stock == "AutoModelForCausalLM" and not any(entry.differences.values())
    assert run.model.config.v_head_dim == 4
    assert {layer.where.rpartition(".")[2] for layer in run.bounds.layers} == {"o_proj"}
    assert [v.verdict for v in run.bounds.verdicts if v.name == "self-test"] == ["HOLDS"]
