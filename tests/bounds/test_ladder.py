"""Soundness of the ladder on random networks, verdicts and their precedence, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn

from modhifi.bounds.certified import certify
from modhifi.bounds.held_out import tabulate
from modhifi.bounds.ladder import verify_model
from modhifi.bounds.statistical import forgetting, statistical
from modhifi.bounds.verdicts import Tolerances, Verdict, enforce, judge, self_test
from modhifi.data.samples import Samples
from modhifi.errors import GateFailed, ModhifiError, SelfTestFailed
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel


class Small(nn.Module):
    """A conv net with every plain rule: BatchNorm, pooling, a residual, a depthwise and a strided conv, a gate."""

    def __init__(self, gate: bool = False) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.wise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.two = nn.Conv2d(8, 8, 1)
        self.squeeze = nn.Conv2d(8, 8, 1) if gate else None
        self.three = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.one(x))))
        y = self.two(nn.functional.silu(self.wise(x)))
        if self.squeeze is not None:
            y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        x += y
        return self.head(torch.relu(self.three(x)).mean((2, 3)))


def random_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def perturbed(model: nn.Module, names: tuple[str, ...], size: float) -> nn.Module:
    """A copy with noise on the parameters and buffers whose names start with one of ``names``."""
    other = copy.deepcopy(model)
    for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
        if name.startswith(names) and tensor.is_floating_point() and "running_var" not in name:
            tensor.data.add_(torch.randn_like(tensor) * size)
    return other


def wrapped(model: nn.Module, shape: tuple[int, ...] = (3, 12, 12)) -> LoadedModel:
    return load_model(model, example=torch.randn(2, *shape))


def samples_of(items: Tensor) -> Samples:
    hashes = tuple(f"{i:016x}" for i in range(len(items)))
    return Samples(lambda i: items[i], hashes, None, hashes, "test", False)


def sound(loaded: LoadedModel, twin: nn.Module, batch: Tensor) -> None:
    """measured <= R2 <= R1 in float64; R1 and R2 must not be trivially infinite."""
    found = certify(loaded, copy.deepcopy(loaded.model).double(), copy.deepcopy(twin).double(), batch.double())
    assert found.violations() == ()
    assert bool(found.local.isfinite().all()) and bool((found.measured > 0).all())
    assert bool((found.measured <= found.local * (1 + 1e-9)).all())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("names", [("one",), ("norm",), ("wise", "three"), ("one", "norm", "two", "head")])
def test_bounds_are_sound_on_conv_nets(seed: int, names: tuple[str, ...]) -> None:
    torch.manual_seed(seed)
    model = random_statistics(Small())
    twin = perturbed(model, names, 0.02 * 4**seed)
    loaded, batch = wrapped(model), torch.randn(6, 3, 12, 12)
    sound(loaded, twin, batch)
    found = certify(loaded, copy.deepcopy(model).double(), copy.deepcopy(twin).double(), batch.double())
    assert bool(found.theorem.isfinite().all()) and found.expected >= float(found.theorem.norm()) / 6**0.5 / (1 + 1e-9)
    assert {p.split(".")[0] for _, parameters, _, _ in found.layers for p in parameters} == set(names)


def test_the_error_behind_a_norm_counts_the_shift_of_its_mean() -> None:
    """A constant added to a conv's output and taken away by the running mean is no error."""
    torch.manual_seed(0)
    model = random_statistics(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    )
    twin = copy.deepcopy(model)
    twin[0].bias.data += 3.0
    twin[1].running_mean += 3.0
    found = certify(
        wrapped(model, (3, 2, 2)), copy.deepcopy(model).double(), twin.double(), torch.randn(4, 3, 2, 2).double()
    )
    assert len(found.layers) == 1 and found.layers[0][2] < 1e-6 and float(found.theorem.max()) < 1e-4


def test_a_squeeze_and_excite_gate_has_a_local_rule_only() -> None:
    torch.manual_seed(1)
    model = random_statistics(Small(gate=True))
    twin = perturbed(model, ("one",), 0.01)
    loaded, batch = wrapped(model), torch.randn(4, 3, 12, 12)
    sound(loaded, twin, batch)
    report = verify_model(loaded, twin, twin, samples_of(batch))
    rungs = {r.name: r for r in report.rungs}
    assert rungs["R1 theorem form"].value is None and "mul at" in rungs["R1 theorem form"].note
    assert rungs["R2 certified-local"].value is not None


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}, ("stages.1", "stages.3")),
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3},
            ("blocks",),
        ),
        ("resnet18", {"channels": (4, 6, 8, 8), "stem_width": 4, "stem_type": "deep"}, ("layer2", "layer4")),
    ],
)
def test_bounds_are_sound_on_timm_models(name: str, arguments: dict[str, object], parts: tuple[str, ...]) -> None:
    torch.manual_seed(2)
    model = random_statistics(timm.create_model(name, num_classes=4, **arguments))
    twin = perturbed(model, parts, 0.003)
    sound(wrapped(model, (3, 32, 32)), twin, torch.randn(3, 3, 32, 32))


def test_an_unknown_operation_is_named_and_the_other_rungs_run() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cumsum(self.a(x), 1))

    torch.manual_seed(0)
    model = Odd().eval()
    loaded, twin = wrapped(model, (4,)), perturbed(model, ("a",), 0.1)
    report = verify_model(loaded, twin, twin, samples_of(torch.randn(100, 4)))
    rungs = {r.name: r for r in report.rungs}
    assert "cumsum" in rungs["R2 certified-local"].note and rungs["R2 certified-local"].value is None
    assert rungs["R4 measured"].value is not None and rungs["R3 share of flips"].value is not None
    # Behind the operation everything is known again.
    behind = verify_model(loaded, twin2 := perturbed(model, ("b",), 0.1), twin2, samples_of(torch.randn(100, 4)))
    assert all(r.value is not None for r in behind.rungs if r.name != "R1 every input")


def test_a_parameter_inside_an_unknown_operation_loses_the_constants_but_not_the_measurement() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.lerp(x, x.square(), self.scale))

    torch.manual_seed(0)
    model = Odd().eval()
    report = verify_model(
        wrapped(model, (4,)), twin := perturbed(model, ("scale", "head"), 0.1), twin, samples_of(torch.randn(100, 4))
    )
    assert report.verdicts[0].verdict == "not measured"
    rungs = {r.name: r for r in report.rungs}
    assert all(rungs[n].value is None for n in ("R1 every input", "R1 theorem form", "R2 certified-local"))
    assert {layer.where for layer in report.layers} == {"head", ""} and rungs["R4 measured"].value > 0


def test_changes_telescope_and_layers_come_in_order() -> None:
    torch.manual_seed(3)
    model = random_statistics(Small())
    twin = perturbed(model, ("one", "wise", "three", "head"), 0.05)
    report = verify_model(wrapped(model), twin, twin, samples_of(torch.randn(8, 3, 12, 12)))
    assert [layer.where for layer in report.layers] == ["one", "wise", "three", "head"]
    assert report.telescoping_gap is not None and report.telescoping_gap < 1e-9
    assert all(layer.amplification <= layer.constant * (1 + 1e-6) for layer in report.layers)
    assert report.verdicts[0].verdict == "HOLDS"


def identical(n: int, flips: int, classes: int = 4) -> tuple[LoadedModel, nn.Module, Samples]:
    """A model, and one that differs on the first ``flips`` of n one-hot-like inputs."""
    model = nn.Linear(classes + 1, classes, bias=False).eval()
    model.weight.data = torch.cat([torch.eye(classes), torch.zeros(classes, 1)], 1)
    twin = copy.deepcopy(model)
    twin.weight.data[:, -1] = torch.tensor([0.0] * (classes - 1) + [10.0])
    items = torch.zeros(n, classes + 1)
    items[torch.arange(n), torch.arange(n) % (classes - 1)] = 1
    items[:flips, -1] = 1
    return wrapped(model, (classes + 1,)), twin, samples_of(items)


@pytest.mark.parametrize(
    ("n", "flips", "tolerance", "verdict"),
    [
        (1000, 0, 0.01, "PASS-STATISTICAL"),
        (1000, 60, 0.01, "FAIL"),
        (10, 0, 0.01, "INCONCLUSIVE"),
        (1000, 9, 0.01, "INCONCLUSIVE"),
        (20, 20, 0.5, "FAIL"),
    ],
)
def test_verdicts(n: int, flips: int, tolerance: float, verdict: str) -> None:
    loaded, twin, held = identical(n, flips)
    report = verify_model(loaded, twin, twin, held, Tolerances(max_flip=tolerance), walked=2)
    assert report.verdicts[1].verdict == verdict
    if verdict.startswith("PASS"):
        report.enforce()
    else:
        with pytest.raises(GateFailed):
            report.enforce()


def test_ten_images_that_do_not_flip_say_how_many_it_takes() -> None:
    loaded, twin, held = identical(10, 0)
    verdict = verify_model(loaded, twin, twin, held, Tolerances(max_flip=0.01), walked=2).verdicts[1]
    # 0.99^n <= 0.05
    assert verdict.settling_n == 299 and "299" in verdict.text


def test_max_error_is_about_the_quantile() -> None:
    loaded, twin, held = identical(1000, 20)
    table = tabulate(loaded, twin, held, 100)
    found = statistical(table, 0.05)
    assert judge(Tolerances(max_error=1.0), found, table, None)[0].verdict == "PASS-STATISTICAL"
    assert judge(Tolerances(max_error=1.0), found, table, 0.5)[0].verdict == "PASS-CERTIFIED"
    loaded, twin, held = identical(1000, 200)
    table = tabulate(loaded, twin, held, 100)
    # A measured failure is stronger than a certificate: one of the two would be a bug, and the failure is shown.
    assert judge(Tolerances(max_error=1.0), statistical(table, 0.05), table, 0.5)[0].verdict == "FAIL"


@pytest.mark.parametrize(
    ("n", "flips", "tolerances", "text", "settling"),
    [
        # 1 - 0.05^(1/10) = 0.259, and 0.99^299 < 0.05
        (
            10,
            0,
            Tolerances(max_flip=0.01),
            "inputs whose top-1 changes: 0 % measured on 10 held-out units, at most 25.9 % with 95 % confidence; "
            "about 299 units would settle it",
            299,
        ),
        # An error as large as the tolerance is within it, and 0.95^59 < 0.05.
        (
            10,
            1,
            Tolerances(max_error=10.0),
            "95% quantile of the output's change: 5.5 measured on 10 held-out units, at most inf with 95 % confidence; "
            "about 59 units would settle it",
            59,
        ),
        (
            10,
            1,
            Tolerances(max_flip=0.1, not_a_sample=True),
            "inputs whose top-1 changes: 10 % measured on 10 held-out units; nothing is claimed beyond them",
            None,
        ),
    ],
)
def test_a_verdict_says_what_was_measured_and_what_would_settle_it(
    n: int, flips: int, tolerances: Tolerances, text: str, settling: int | None
) -> None:
    loaded, twin, held = identical(n, flips)
    table = tabulate(loaded, twin, held, n)
    (verdict,) = judge(tolerances, statistical(table, tolerances.alpha), table, None)
    assert (verdict.text, verdict.settling_n) == (text, settling)


def test_the_self_test_says_on_how_many_samples_it_holds() -> None:
    assert self_test((), 7).text == "measured <= R2 <= R1 on each of 7 samples" and self_test((), 7).verdict == "HOLDS"
    assert self_test((), 0).verdict == "not measured" and self_test((), 7, False).verdict == "not measured"
    assert (self_test(("a", "b"), 7).verdict, self_test(("a", "b"), 7).text) == ("BUG", "a; b")


def test_units_that_are_no_sample_claim_nothing_more() -> None:
    loaded, twin, held = identical(10, 0)
    tolerances = Tolerances(max_flip=0.01, not_a_sample=True)
    assert verify_model(loaded, twin, twin, held, tolerances, walked=2).verdicts[1].verdict == "PASS-ON-SAMPLES"
    loaded, twin, held = identical(10, 1)
    assert verify_model(loaded, twin, twin, held, tolerances, walked=2).verdicts[1].verdict == "FAIL"


def test_an_untouched_model_is_certified() -> None:
    loaded, _, held = identical(30, 0)
    report = verify_model(loaded, loaded.model, loaded.model, held, Tolerances(max_flip=0.5))
    assert report.verdicts[1].verdict == "PASS-CERTIFIED"
    assert report.layers == () and {r.value for r in report.rungs if r.name.startswith(("R2", "R4"))} == {0.0}


def test_precedence_of_the_exit_codes() -> None:
    bug, fail = Verdict("self-test", "BUG", "x"), Verdict("max flip", "FAIL", "y")
    with pytest.raises(SelfTestFailed):
        enforce((fail, bug))
    enforce((Verdict("self-test", "HOLDS", ""),))


def test_bad_models_are_refused() -> None:
    loaded, twin, held = identical(10, 0)
    twin.train()
    with pytest.raises(ModhifiError, match="train mode"):
        verify_model(loaded, twin, twin, held)
    twin.eval()
    twin.weight.data[0, 0] = math.nan
    with pytest.raises(GateFailed, match="not finite"):
        verify_model(loaded, twin, twin, held)
    with pytest.raises(ModhifiError, match="max-flip"):
        Tolerances(max_flip=5)


def test_forgetting_is_a_lower_bound() -> None:
    found = forgetting(torch.tensor([1] * 95 + [3] * 5), torch.tensor([3]), 0.05)
    assert found.still_predicted == 5 and 0.85 < found.lower < found.measured == 0.95


def test_the_report_is_json() -> None:
    import json

    loaded, twin, held = identical(30, 2)
    content = verify_model(loaded, twin, twin, held, Tolerances(max_flip=0.5, max_error=3.0), walked=4).to_json()
    json.dumps(content, allow_nan=False)
    assert {"name", "verdict", "text"} <= content["verdicts"][0].keys()


def test_certified_rungs_that_take_too_long_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = random_statistics(Small())
    loaded, held = load_model(model, example=torch.zeros(2, 3, 12, 12)), samples_of(torch.randn(8, 3, 12, 12))
    twin = perturbed(model, ("two",), 0.01)
    monkeypatch.setattr("modhifi.bounds.ladder.PATIENCE", -1.0)
    monkeypatch.setattr("modhifi.bounds.ladder.SHARE", 0.0)
    report = verify_model(loaded, twin, twin, held)
    by_name = {rung.name: rung for rung in report.rungs}
    for name in ("R1 theorem form", "R1 every input", "R2 certified-local", "R4 measured"):
        assert by_name[name].value is None and "a tenth of the run; ask with --walked N" in by_name[name].note
    (warning,) = report.warnings
    assert warning.startswith("the certified rungs (R1, R2, R4) are left out: ")
    assert report.verdicts[0].verdict == "not measured" and by_name["R3 share of flips"].value is not None
    asked = verify_model(loaded, twin, twin, held, walked=2)  # takes the time it takes
    assert not asked.warnings and asked.verdicts[0].verdict == "HOLDS"
    monkeypatch.setattr("modhifi.bounds.ladder.SHARE", 0.1)
    assert verify_model(loaded, twin, twin, held, spent=1e6).verdicts[0].verdict == "HOLDS"  # of a long run
