"""A group that cannot be measured or solved stays as it is; numbers that are not finite are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_text
import torch
from tiny import Net, conv
from torch import Tensor, nn
from typer.testing import CliRunner

import modhifi
from modhifi.cli.main import app
from modhifi.data.samples import Samples
from modhifi.errors import IndefiniteError, ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning import curves as removal
from modhifi.pruning import elimination
from modhifi.pruning.budget import Budget
from modhifi.pruning.compensations import lstsq
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.structure.plan import Plan

PIXELS = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Two(Net):
    """Two branches of 10 and of 8 inner channels; ``between`` works on what the second one reads."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu, behind: float = 1.0) -> None:
        super().__init__()
        self.a, self.b = conv(8, 10, bias=True), conv(10, 8, bias=True)
        self.c, self.d = conv(8, 8, bias=True), conv(8, 8, 1, bias=True)
        self.between, self.behind = between, behind

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + self.d(self.between(self.c(x))) * self.behind


def samples_of(pixels: Tensor) -> Samples:
    names = tuple(f"image {i}" for i in range(len(pixels)))
    return Samples(lambda i: pixels[i], names, None, names, "pixels", False)


def loaded_net(*args: Any, dtype: torch.dtype = torch.float32) -> LoadedModel:
    torch.manual_seed(0)
    return load_model(Two(*args).eval().to(dtype), example=PIXELS[:2].to(dtype))


def huge(x: Tensor) -> Tensor:
    return x * 1e25


SETTINGS = PruneSettings(only=("a", "c"), weighting="energy", batch_size=8)


def test_products_that_overflow_leave_their_group() -> None:
    loaded = loaded_net(huge, 1e-25)
    pruned = prune_model(loaded, samples_of(PIXELS), Budget("components", 0.5), SETTINGS)
    assert dict(pruned.left) == {"c": "the squares of what its reader 'd' reads overflow"}
    assert len(pruned.plan.kept["a"]) == 5 and "c" not in pruned.plan.kept
    assert pruned.model.c.out_channels == 8 and bool(pruned.model(PIXELS).isfinite().all())
    strict = PruneSettings(only=("a", "c"), weighting="energy", batch_size=8, strict=True)
    with pytest.raises(ModhifiError, match="'c' cannot be pruned: the squares of what its reader 'd' reads overflow"):
        prune_model(loaded, samples_of(PIXELS), Budget("components", 0.5), strict)


def test_the_report_names_what_was_left() -> None:
    given = dict(method={"only": ["a", "c"], "allocate": "energy"}, checks={"walked": 0}, samples=16)
    done = modhifi.prune(loaded_net(huge, 1e-25), PIXELS, ratio=0.5, **given)
    assert "the group 'c' stays as it is: the squares of what its reader 'd' reads overflow" in done.report["warnings"]
    reasons = {g["name"]: g["reason"] for g in done.report["refused"]}
    assert reasons["c"].startswith("the squares")
    assert PruneRecipe.model_validate({"model": {"name": "x"}}).method.strict is False


def test_nothing_left_is_an_error() -> None:
    settings = PruneSettings(only=("c",), weighting="energy", batch_size=8)
    with pytest.raises(ModhifiError, match="no group can be pruned; of 1, 'c': the squares"):
        prune_model(loaded_net(huge, 1e-25), samples_of(PIXELS), Budget("components", 0.5), settings)


def test_a_budget_out_of_reach_says_what_stays() -> None:
    with pytest.raises(ModhifiError, match=r"(?s)nearest to.*the group 'c' has to stay as it is"):
        prune_model(loaded_net(huge, 1e-25), samples_of(PIXELS), Budget("components", 0.55), SETTINGS)


def test_an_activation_that_overflows_is_named() -> None:
    pixels = PIXELS.clone()
    pixels[13] *= 1e4
    with pytest.raises(ModhifiError, match=r"'d' of the group 'c' reads is not finite on sample 'image 13'; check"):
        prune_model(loaded_net(lambda x: (x * 1e36).relu()), samples_of(pixels), Budget("components", 0.5), SETTINGS)


def test_half_precision_that_overflows_is_named() -> None:
    loaded = loaded_net(lambda x: (x * 1e3).relu(), dtype=torch.float16)
    pixels = PIXELS.clone()
    pixels[5] *= 1e3
    with pytest.raises(ModhifiError, match="on sample 'image 5'; give the model in bfloat16 or float32"):
        prune_model(loaded, samples_of(pixels.half()), Budget("components", 0.5), SETTINGS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_sample_is_named(value: float) -> None:
    pixels = PIXELS.clone()
    pixels[17, 0, 0, 0] = value
    with pytest.raises(ModhifiError, match="sample 'image 17' holds NaN or infinite values"):
        prune_model(loaded_net(), samples_of(pixels), Budget("components", 0.5), SETTINGS)
    with pytest.raises(ModhifiError, match="item 17 of the data holds NaN or infinite values"):
        modhifi.prune(loaded_net(), pixels, ratio=0.5)


class Sometimes(Two):
    """The second branch runs on two samples at a time only, as the example has."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) if len(x) == 2 else self.b(self.a(x).relu())


def test_a_layer_that_never_runs_leaves_its_group() -> None:
    torch.manual_seed(0)
    loaded = load_model(Sometimes().eval(), example=PIXELS[:2])
    pruned = prune_model(loaded, samples_of(PIXELS), Budget("components", 0.5), SETTINGS)
    assert dict(pruned.left) == {"c": "its reader 'd' was never run on the calibration data"}


def test_scores_name_what_cannot_be_measured() -> None:
    torch.manual_seed(0)
    loaded = load_model(Sometimes().eval(), example=PIXELS[:2])
    scores = modhifi.score(loaded, PIXELS)
    never = "was never run on the calibration data"
    assert scores.left == {"stem.0": f"its reader 'c' {never}", "c": f"its reader 'd' {never}"}
    assert {s.group for s in scores} == {"a", "b"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modhifi.cli.score.score_model", lambda *_: scores)
        patch.setattr("modhifi.cli.score.load_source", lambda _: loaded)
        result = CliRunner().invoke(app, ["score", "mine"])
    assert result.exit_code == 0
    assert f"modhifi: warning: the group 'c' has no scores: its reader 'd' {never}\n" in result.stderr


def test_scores_name_what_cannot_be_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_curves(monkeypatch)
    scores = modhifi.score(loaded_net(), PIXELS)
    assert "c" in scores.left and "a" in {s.group for s in scores}


# -- Grams without a factorisation: of those that each route solves, one is made to fail -------------------------------
def failing_curves(monkeypatch: pytest.MonkeyPatch, error: type[Exception] = IndefiniteError) -> None:
    real = elimination._eliminate

    def eliminate(jobs: Any, *more: Any) -> Any:
        if len(jobs[0].readers[0].owner) == 8:
            raise error
        return real(jobs, *more)

    monkeypatch.setattr(elimination, "_eliminate", eliminate)


def singular_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_curves(monkeypatch, torch.linalg.LinAlgError)


def failing_products(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lstsq.factorise

    def factorise(matrix: Tensor, *more: Any) -> Any:
        if len(matrix) == 6:  # what is left of the second branch's reader, which is 1 x 1
            raise IndefiniteError
        return real(matrix, *more)

    monkeypatch.setattr(lstsq, "factorise", factorise)


PLAN = Plan({"a": (0, 1, 2, 3, 4, 5, 6), "c": (0, 1, 2, 3, 4, 5)})
ROUTES: dict[str, tuple[Callable[..., None], dict[str, Any], Plan | None]] = {
    "curves": (failing_curves, {}, None),
    "curves, singular": (singular_curves, {}, None),
    "curves, uniform": (failing_curves, {"layout": "uniform"}, None),
    "curves, probed": (failing_curves, {"weighting": "amplification"}, None),
    "plan": (failing_products, {}, PLAN),
    "plan, sequential": (failing_products, {"sequential": "own"}, PLAN),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_group_without_a_solution_stays_as_it_is(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail, changes, plan = ROUTES[route]
    fail(monkeypatch)
    how = {"only": ("a", "c"), "weighting": "energy", "batch_size": 8} | changes
    budget = None if plan is not None else Budget("components", 0.5)
    pruned = prune_model(loaded_net(), samples_of(PIXELS), budget, PruneSettings(**how), plan=plan)
    assert list(pruned.left) == ["c"] and "no factorisation" in pruned.left["c"]
    assert list(pruned.plan.kept) == ["a"]
    assert pruned.model.c.out_channels == 8 and pruned.model.a.out_channels == len(pruned.plan.kept["a"])
    with pytest.raises(IndefiniteError, match="the group 'c' needs"):
        prune_model(loaded_net(), samples_of(PIXELS), budget, PruneSettings(**how, strict=True), plan=plan)


def test_block_by_block_a_group_without_a_solution_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(tiny_text.llama())
    ids = torch.randint(3, tiny_text.VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(8)))
    samples = Samples(lambda i: ids[i], names, None, names, "tokens", False)
    real, calls = removal.eliminate_together, []

    def eliminate(jobs: Any, *given: Any) -> Any:
        calls.append(1)
        curves = real(jobs, *given)
        return [None, *curves[1:]] if len(calls) == 1 else curves

    monkeypatch.setattr(removal, "eliminate_together", eliminate)
    settings = PruneSettings(layout="uniform", only=("neurons",), batch_size=4)
    pruned = prune_model(loaded, samples, Budget("components", 0.5), settings)
    (left,) = pruned.left
    assert left not in pruned.plan.kept and len(pruned.plan.kept) == 1
    assert nn.Module.get_submodule(pruned.model, left).out_features == 24
    calls.clear()
    with pytest.raises(IndefiniteError, match=f"the group '{left}' needs"):
        prune_model(loaded, samples, Budget("components", 0.5), PruneSettings(**vars(settings) | {"strict": True}))
