"""What removed blocks added is made up for as well as the writer before them can, at the cost that is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from deep import NAMES, deep, inputs, known, of_kind
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import modhifi
from modhifi.artifacts.reload_check import Loader
from modhifi.data.in_memory import from_items
from modhifi.data.samples import Samples
from modhifi.models.artifact import load_artifact
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.depth import fold, moments_of_plans, remove_branches
from modhifi.pruning.depth_order import depth_curves
from modhifi.pruning.editing import edit_readers
from modhifi.pruning.output_change import output_change
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, measure_moments
from modhifi.structure.clone import clone
from modhifi.structure.depth import removed_parts, spans
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import Sizes, sizes_of

SETTINGS = PruneSettings(ridge=1e-12, rows_per_column=None, batch_size=8, only=("blocks",))


@pytest.fixture
def no_shrinkage(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("depth", "readers"):
        monkeypatch.setattr(
            f"modhifi.pruning.{place}.shrinkage", lambda second, rows: torch.zeros(len(second)).double()
        )


def samples_of(loaded: LoadedModel, count: int = 24) -> Samples:
    return from_items(inputs(loaded, count), None, n=count, seed=0)


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [0, 2, 3]])
def test_the_fold_is_least_squares(no_shrinkage: None, kept: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    added = x @ torch.randn(5, 3, generator=generator).double() + torch.randn(200, 3, generator=generator).double()
    both, stay = torch.cat([x, added], 1), torch.zeros(5, dtype=torch.bool)
    stay[kept] = True
    found = fold(both.T @ both / 200, 200, stay, 1e-12)
    torch.testing.assert_close(found[:, kept], torch.linalg.lstsq(x[:, kept], added).solution.T)
    assert not found[:, ~stay].any()


def raw_rows(loaded: LoadedModel, model: nn.Module, writer: str, streams: Mapping[str, str], batch: Tensor):
    """The writer's input rows ``(r, d)`` of one pass, and the streams ``(r, o)`` at some modules, in their order."""
    seen: dict[str, Tensor] = {}
    hooks = [model.get_submodule(writer).register_forward_pre_hook(lambda _, args: seen.update(x=args[0].clone()))]
    for name, module in streams.items():
        if module.endswith(".act2"):  # what follows the addition, and works in place
            see = lambda _, args, name=name: seen.update({name: args[0].clone()})  # noqa: E731
            hooks.append(model.get_submodule(module).register_forward_pre_hook(see))
        else:
            get = lambda _, args, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})  # noqa: E731
            hooks.append(model.get_submodule(module).register_forward_hook(get))
    with torch.no_grad():
        loaded.logits(batch, model)
    for hook in hooks:
        hook.remove()
    layer = model.get_submodule(writer)
    if hasattr(layer, "kernel_size"):
        x = F.unfold(seen.pop("x"), layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
        rows = {name: stream.flatten(2).mT for name, stream in seen.items()}
    else:
        x = seen.pop("x")
        rows = {
            n: s.permute(0, 2, 3, 1) if s.ndim == 4 and s.shape[-1] != x.shape[-1] // 4 else s for n, s in seen.items()
        }
    outputs = {name: stream.reshape(-1, stream.shape[-1]).double() for name, stream in rows.items()}
    return x.reshape(-1, x.shape[-1]).double(), outputs


@pytest.mark.parametrize(
    ("name", "cut"), [*((name, False) for name in (*NAMES, "llama, tied")), ("llama", True), ("resnet18", True)]
)
def test_nothing_that_the_writer_reads_tells_of_what_is_still_missing(name: str, cut: bool, no_shrinkage: None) -> None:
    loaded, whole = known(name)
    structure, samples = of_kind(whole, "blocks"), samples_of(loaded)
    blocks = next(g for g in structure.prunable if g.n > 1 or name not in ("resnet18", "swin"))
    plan = Plan({blocks.name: tuple(range(blocks.n - 1))})
    (span,) = spans(structure, removed_parts(structure, plan))
    keeper, last = span.keeper, span.removed[-1]
    inner = [g for g in whole.prunable if any(s.module == keeper.writer for s in g.readers) and not g.coupled]
    kept = None
    if cut:
        (group,) = inner
        plan = replace(plan, kept=plan.kept | {group.name: tuple(range(0, group.n, 2))})
        structure = whole.select([group.name, blocks.name])
        index = group.readers[0].index[::2].reshape(-1)
        kernel = 9 if name == "resnet18" else 1
        kept = (index[:, None] * kernel + torch.arange(kernel)).reshape(-1)
    moments = moments_of_plans(loaded, structure, [plan], samples, SETTINGS)
    edited = clone(loaded.model)
    if cut:
        edit_readers(edited, structure, plan, measure_moments(loaded, structure, samples, SETTINGS.sampling), SETTINGS)
    (error,) = remove_branches(edited, structure, plan, moments, SETTINGS)
    suffix = ".act2" if name == "resnet18" else ""
    batch = next(samples.batches(len(samples)))
    x, dense = raw_rows(loaded, loaded.model, keeper.writer, {"stream": f"{last.block}{suffix}"}, batch)
    _, now = raw_rows(loaded, edited, keeper.writer, {"stream": f"{keeper.block}{suffix}"}, batch)
    missing = dense["stream"] - now["stream"]
    x = x if kept is None else x[:, kept]
    scale = float(missing.square().mean().sqrt() * x.square().mean().sqrt())
    assert float((missing.T @ x / len(x)).abs().max()) < 1e-3 * scale
    if structure.operators[keeper.writer].sink is not None:
        assert float(missing.mean(0).abs().max()) < 1e-3 * float(missing.square().mean().sqrt())
    if not cut:
        assert error.error == pytest.approx(float(missing.square().sum(1).mean() - 0), rel=2e-2)
        assert error.error < error.energy


@pytest.fixture(scope="module")
def world() -> tuple[LoadedModel, Structure, Samples]:
    loaded, structure = known("llama")
    return loaded, of_kind(structure, "blocks"), samples_of(loaded, 12)


def test_one_block_goes_after_the_other_by_what_all_together_do(world: tuple[LoadedModel, Structure, Samples]) -> None:
    loaded, structure, samples = world
    settings, budget = replace(SETTINGS, ridge=1e-4), Budget("parameters", 0.5)
    (curve,) = depth_curves(loaded, structure, samples, budget, settings, measured=True).values()
    (group,) = structure.prunable
    probe = next(samples.batches(3))  # what three blocks are probed on

    def divergence(gone: tuple[int, ...]) -> float:
        plan = Plan({group.name: tuple(n for n in range(group.n) if n not in gone)})
        edited, moments = clone(loaded.model), moments_of_plans(loaded, structure, [plan], samples, settings)
        remove_branches(edited, structure, plan, moments, settings)
        return output_change(loaded.logits(probe), loaded.logits(probe, edited))

    first = min(range(group.n), key=lambda n: divergence((n,)))
    gone, costs = (first,), [0.0, divergence((first,))]
    while len(gone) < group.n:
        beside = [n for n in range(group.n) if n not in gone and {n - 1, n + 1} & set(gone)]
        gone = min(((*gone, n) for n in beside), key=divergence)
        costs.append(max(costs[-1], divergence(gone)))
    assert curve.order.tolist() == list(gone)
    assert curve.cost.tolist() == pytest.approx(costs, rel=1e-4)
    assert len(gone) == 3  # half of the parameters lie in more than two of the blocks


def test_the_budget_decides_how_many_blocks_go(world: tuple[LoadedModel, Structure, Samples]) -> None:
    loaded, structure, samples = world
    total = sum(p.numel() for p in loaded.model.parameters())
    block = sum(p.numel() for p in loaded.model.model.layers[1].parameters())
    settings = replace(SETTINGS, layout="global")
    for count in (1, 2):
        pruned = prune_model(loaded, samples, Budget("parameters", 1 - count * block / total), settings)
        assert len(pruned.model.model.layers) == 4 - count
        assert sum(p.numel() for p in pruned.model.parameters()) == total - count * block


@dataclass(frozen=True)
class Parameters:
    """A gauge by parameters."""

    sizes: Sizes
    at_once: int = 1
    rest: float = 0.0

    def amount(self, widths: Mapping[str, int]) -> float:
        return self.sizes.parameters(widths)

    def by_operator(self, widths: Mapping[str, int]) -> dict[str, float]:
        return {}

    def touching(self) -> dict[str, Parameters]:
        return {name: replace(self, sizes=own) for name, own in self.sizes.touching().items()}

    def ordered(self, removed: Mapping[str, Sequence[int]]) -> Parameters:
        return replace(self, sizes=self.sizes.ordered(removed))

    def of(self, plan: Plan) -> Parameters:
        return replace(self, sizes=self.sizes.of(plan))


@dataclass(frozen=True)
class Slow:
    """A meter that finds every smaller network to take ``slower`` times its share of the parameters."""

    told: Parameters
    slower: float

    def gauge(self, *_: object) -> Parameters:
        return self.told

    def ratio(self, loaded: LoadedModel, structure: Structure, plan: Plan) -> tuple[float, float]:
        left = self.told.of(plan).amount({name: len(kept) for name, kept in plan.kept.items()})
        return self.slower * left / self.told.amount({}), 0.0

    def by_operator(self, *_: object) -> dict[str, tuple[float, float]]:
        return {}


def test_one_block_more_goes_where_the_time_is_longer_than_predicted(
    world: tuple[LoadedModel, Structure, Samples],
) -> None:
    loaded, structure, samples = world
    told, (group,) = Parameters(sizes_of(loaded.model, structure)), structure.prunable
    left = [told.amount({group.name: group.n - gone}) / told.amount({}) for gone in range(3)]
    settings, budget = replace(SETTINGS, layout="global"), Budget("latency", left[1])
    for slower, blocks in ((1.0, 3), (left[1] / left[2], 2)):
        pruned = prune_model(loaded, samples, budget, settings, meter=Slow(told, slower))
        assert len(pruned.model.model.layers) == blocks
        assert pruned.metered is not None and pruned.metered.met


def test_what_lies_in_a_block_that_goes_stays_out_of_the_plan(world: tuple[LoadedModel, Structure, Samples]) -> None:
    loaded, _, samples = world
    settings = replace(SETTINGS, only=("blocks", "neurons"), layout="uniform")
    pruned = prune_model(loaded, samples, Budget("parameters", 0.6), settings)
    gone = removed_parts(pruned.structure, pruned.plan)
    assert gone and any("mlp" in name for name in pruned.plan.kept)
    assert not any(name.startswith(f"{part}.") for name in pruned.plan.kept for part in gone)


@pytest.mark.parametrize("sequential", [None, "dense"])
def test_a_reader_behind_a_removed_block_is_solved_for_what_it_then_reads(
    sequential: str | None, no_shrinkage: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modhifi.pruning.sequential.shrinkage", lambda second, rows: torch.zeros(len(second)).double())
    loaded, whole = known("resnet18")
    samples, reader = samples_of(loaded), "layer2.0.conv2"
    blocks = next(g for g in whole.prunable if g.parts and g.n > 1)
    group = next(g for g in whole.prunable if any(s.module == reader for s in g.readers) and not g.coupled)
    structure = whole.select([blocks.name, group.name])
    plan = Plan({blocks.name: tuple(range(blocks.n - 1)), group.name: tuple(range(0, group.n, 2))})
    settings = replace(SETTINGS, sequential=sequential)
    moments = measure_moments(loaded, structure, samples, settings.sampling)
    pruned = apply_plan(loaded, structure, plan, moments, settings, samples)
    batch, at = next(samples.batches(len(samples))), {"output": reader}
    _, dense = raw_rows(loaded, loaded.model, reader, at, batch)
    x, now = raw_rows(loaded, pruned.model, reader, at, batch)
    missing = dense["output"] - now["output"]
    missing, x = missing - missing.mean(0), x - x.mean(0)
    scale = float(missing.square().mean().sqrt() * x.square().mean().sqrt())
    assert (float((missing.T @ x / len(x)).abs().max()) < 1e-3 * scale) == (sequential == "dense")


@pytest.mark.slow
def test_a_model_with_fewer_blocks_is_stock_and_can_lose_more(tmp_path: Path) -> None:
    loaded = deep("llama")
    items, few = inputs(loaded, 16), {"samples": 8, "evaluation_samples": 4}
    result = modhifi.prune(loaded.model, items, params="0.85x", method={"only": ["blocks"]}, out=tmp_path / "a", **few)
    row = next(g for g in result.report["groups"] if g["kind"] == "blocks")
    assert (row["name"], row["n"], row["kept"]) == ("model.layers", 3, 2) and 0 < row["relative_error"] < 1
    assert next(v["verdict"] for v in result.report["verdicts"] if v["name"] == "self-test") == "HOLDS"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert stock.config.num_hidden_layers == 3
    torch.testing.assert_close(stock(items).logits, result.model(items).logits)
    again = load_artifact(tmp_path / "a")
    assert again.artifact is not None and again.artifact.manifest.model.stock == "AutoModelForCausalLM"
    method = {"only": ["sublayers", "neurons"], "layout": "uniform"}
    second = modhifi.prune(tmp_path / "a", items, params="0.7x", method=method, out=tmp_path / "b", **few)
    manifest = load_artifact(tmp_path / "b").artifact.manifest.model
    assert manifest.remote == "AutoModelForCausalLM" and manifest.differences["removed"]
    remote = Loader("transformers", manifest.remote, code=True)(tmp_path / "b")
    torch.testing.assert_close(remote.logits(items), second.model(items).logits)
