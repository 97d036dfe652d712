from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from modhifi.calibration import sampling as sampling_module
from modhifi.calibration.accumulator import Accumulator
from modhifi.calibration.collect import MomentCollector, collect
from modhifi.calibration.im2col import reader_rows, spread_positions
from modhifi.calibration.moments import Moments, Spanned
from modhifi.calibration.sampling import Sampling
from modhifi.models.hooks import batch_statistics

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

CONVS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "padding": lambda: nn.Conv2d(4, 6, (3, 1), padding=(1, 0)),
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=(2, 3), padding=1),
    "dilation": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "padding by name": lambda: nn.Conv2d(4, 6, (2, 3), padding="same"),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "same": lambda: Conv2dSame(4, 6, 3, stride=2),
    "one pixel": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "one axis": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "volume": lambda: nn.Conv3d(4, 2, 2, stride=2),
}


def example(module: nn.Module, n: int = 6) -> Tensor:
    axes = {nn.Conv1d: (11,), nn.Conv3d: (4, 5, 6)}.get(type(module), (9, 11))
    return torch.randn(n, 4, *axes, generator=torch.Generator().manual_seed(3)) + 0.5


def of_rows(rows: Tensor) -> Moments:
    """Brute force from all rows ``(G, d, r)``."""
    rows = rows.double()
    mean = rows.mean(2)
    return Moments(rows.shape[2], mean, torch.einsum("gir,gjr->gij", rows, rows) / rows.shape[2] - outer(mean))


def outer(mean: Tensor) -> Tensor:
    return mean[:, :, None] * mean[:, None, :]


EVERY_POSITION = Sampling(rows_per_column=None)


def gathered(module: nn.Module, batches: list[Tensor], sampling: Sampling = EVERY_POSITION) -> Moments:
    collector = MomentCollector({"it": module}, sampling, samples=sum(map(len, batches)))
    first = 0
    with collector, torch.no_grad():
        for batch in batches:
            collector.start(first)
            module(batch)
            first += len(batch)
    return collector.moments()["it"]


def close(a: Moments, b: Moments, rtol: float = 1e-5) -> None:
    assert a.n == b.n
    torch.testing.assert_close(a.mean, b.mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(a.cov, b.cov, rtol=rtol, atol=rtol)
    torch.testing.assert_close(a.gram, b.gram, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", CONVS)
@torch.no_grad()
def test_rows_times_weights_are_the_convolution(name: str):
    """What defines the rows: the weight matrix applied to them gives the output, pixel by pixel."""
    torch.manual_seed(0)
    module = CONVS[name]()
    x = example(module)
    rows = reader_rows(module, x)
    weight = module.weight.reshape(len(rows), -1, rows.shape[1])
    expected = module(x).flatten(2).transpose(0, 1).flatten(1) - module.bias[:, None]
    torch.testing.assert_close((weight @ rows).flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_columns_are_in_the_order_of_unfold(groups: int):
    module = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=groups)
    x = example(module)
    patches = F.unfold(x, 3, dilation=2, padding=1, stride=2)
    expected = patches.transpose(0, 1).reshape(groups, 36 // groups, -1)
    assert torch.equal(reader_rows(module, x), expected)


@pytest.mark.parametrize("name", CONVS)
def test_streaming_equals_brute_force(name: str):
    module = CONVS[name]()
    x = example(module)
    close(gathered(module, [x[:1], x[1:4], x[4:]]), of_rows(reader_rows(module, x)))


@pytest.mark.parametrize("shape", [(6, 5), (6, 7, 5), (6, 2, 3, 5)])
def test_linear_readers_see_every_token(shape: tuple[int, ...]):
    x = torch.randn(shape) * torch.arange(1.0, 6.0) + 3
    found = gathered(nn.Linear(5, 2), [x[:2], x[2:]])
    close(found, of_rows(x.reshape(-1, 5).T[None]))


def test_masked_tokens_do_not_count():
    x, module = torch.randn(3, 4, 5), nn.Linear(5, 2)
    keep = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    collector = MomentCollector({"it": module}, EVERY_POSITION, samples=3)
    with collector:
        collector.start(0, keep)
        module(x)
    close(collector.moments()["it"], of_rows(x[keep].T[None]))


def test_a_large_mean_does_not_eat_the_variance():
    """Squares subtracted in single precision would lose a variance of 1 beside a mean of 10,000."""
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    found = gathered(nn.Linear(3, 2), list(x.split(500)))
    torch.testing.assert_close(found.cov[0], torch.cov(x.double().T, correction=0), rtol=1e-3, atol=1e-3)
    assert bool((found.cov[0].diagonal() > 0.8).all())


def test_a_batch_without_rows_changes_nothing():
    rows, sums = torch.randn(1, 4, 30) + 5, Accumulator()
    for part in (rows[:, :, :0], rows[:, :, :20], rows[:, :, :0], rows[:, :, 20:]):
        sums.add(part)
    close(sums.finish(), of_rows(rows))


def test_wide_readers_are_summed_in_strips():
    rows = torch.randn(1, 1100, 30)
    sums = Accumulator()
    sums.add(rows[:, :, :20])
    sums.add(rows[:, :, 20:])
    close(sums.finish(), of_rows(rows))


@pytest.mark.parametrize(("large", "width"), [(2**27, 40), (1, 40), (1, 100)])
def test_a_pass_that_goes_on_from_stored_sums_gives_the_same_bits(
    large: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a large Gram are held where few are expected, by the first batch, and else summed in runs of batches."""
    monkeypatch.setattr("modhifi.calibration.accumulator.LARGE", large)
    module, sampling = nn.Linear(width, 2), Sampling(batch_size=1)
    batches = [torch.randn(1, 2 + number % 2, width) for number in range(16)]

    def run(collector: MomentCollector, numbers: range) -> MomentCollector:
        with collector, torch.no_grad():
            for number in numbers:
                collector.start(number)
                module(batches[number])
        return collector

    def fresh() -> MomentCollector:
        return MomentCollector({"it": module}, sampling, samples=16)

    whole = run(fresh(), range(16)).moments()["it"]
    assert isinstance(whole, Spanned) == (large == 1 and width == 100)
    for end in (1, 4, 7):
        begun, rest = run(fresh(), range(end)).sums["it"], fresh()
        rest.sums["it"].restore(begun.n, begun.state())
        moments = run(rest, range(end, 16)).moments()["it"]
        assert torch.equal(moments.mean, whole.mean) and torch.equal(moments.cov, whole.cov)


def test_positions_depend_on_the_sample_and_not_on_the_batch(monkeypatch):
    monkeypatch.setattr(sampling_module, "LEAST_ROWS", 1)
    module = nn.Conv2d(4, 6, 3, padding=1)
    x = example(module)
    whole = gathered(module, [x], Sampling(1, seed=5))
    parts = gathered(module, [x[:1], x[1:2], x[2:]], Sampling(1, seed=5))
    assert whole.n == 6 * 6  # 36 columns, 6 samples, ceil(36 / 6) positions of each
    close(whole, parts)
    other = gathered(module, [x], Sampling(1, seed=6))
    assert (other.mean - whole.mean).abs().max() > 1e-3


def test_few_positions_are_all_taken():
    module = nn.Conv2d(4, 6, 3, padding=1)
    x = example(module)
    close(gathered(module, [x], Sampling(10_000)), of_rows(reader_rows(module, x)))


def test_positions_are_visited_equally_often():
    """Unbiased: over many samples the sub-sampled rows are spread evenly over the image."""
    at = spread_positions(total=12, wanted=5, start=0, count=24, seed=1)
    assert at.shape == (24, 5)
    assert all(len(set(row)) == 5 for row in at.tolist())
    assert torch.bincount(at.flatten(), minlength=12).tolist() == [10] * 12
    assert torch.equal(at[7:11], spread_positions(12, 5, start=7, count=4, seed=1))


def test_sub_sampling_estimates_the_moments_of_all_positions(monkeypatch):
    monkeypatch.setattr(sampling_module, "LEAST_ROWS", 1)
    module = nn.Conv2d(2, 3, 3, padding=1)
    generator = torch.Generator().manual_seed(0)
    x = F.avg_pool2d(torch.randn(300, 2, 14, 14, generator=generator), 3, stride=1)
    few, every = gathered(module, [x], Sampling(100)), of_rows(reader_rows(module, x))
    assert every.n == 300 * 144 and few.n == 300 * 6
    # 1,800 rows, correlated within an image: four standard errors of about 1 / sqrt(1800)
    scale = every.cov[0].diagonal().mean()
    assert (few.cov - every.cov).abs().max() < 0.1 * scale
    assert (few.mean - every.mean).abs().max() < 0.1 * scale.sqrt()


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_batch_statistics_prescribe_the_outputs_moments_and_leave_no_trace():
    model, _ = tiny.pattern("residual")
    x = 5 * torch.randn(16, 3, 12, 12, dtype=torch.float64) - 3
    norm, seen = model.first[1], []
    before, calm = statistics(model), model(x)
    handle = norm.register_forward_hook(lambda m, a, out: seen.append(out))
    with batch_statistics(model):
        model(x)
    handle.remove()
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), norm.bias)
    torch.testing.assert_close(seen[0].var((0, 2, 3), correction=0), norm.weight.square(), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    assert torch.equal(model(x), calm) and not any(m.training for m in model.modules())
    assert norm.momentum == nn.BatchNorm2d(1).momentum


def test_batch_statistics_are_put_back_after_an_error():
    model, x = tiny.pattern("plain")
    before = statistics(model)
    with pytest.raises(RuntimeError), batch_statistics(model):
        model(x)
        model(x[:, :2])
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    assert not any(m.training for m in model.modules())


def test_inactive_batch_statistics_do_nothing():
    model, x = tiny.pattern("plain")
    with batch_statistics(model, active=False):
        assert not model.stem[1].training


@pytest.mark.parametrize("synthetic", [False, True])
def test_collecting_over_a_model(synthetic: bool):
    model, _ = tiny.pattern("grouped")
    model.float()
    batches = [torch.randn(4, 3, 12, 12) for _ in range(3)]
    readers = {name: model.get_submodule(name) for name in ("inner.0", "grouped.0", "head")}
    seen: dict[str, list[Tensor]] = {name: [] for name in readers}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(reader_rows(m, args[0])))
        for name, module in readers.items()
    ]
    found = collect(model, model, iter(batches), readers, EVERY_POSITION, samples=12, use_batch_statistics=synthetic)
    for handle in handles:
        handle.remove()
    assert found["grouped.0"].cov.shape == (3, 36, 36) and found["head"].cov.shape == (1, 6, 6)
    for name, seen_moments in found.items():
        close(seen_moments, of_rows(torch.cat(seen[name], 2)))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_reader_that_never_ran_is_missing():
    model, x = tiny.pattern("plain")
    found = collect(model, model, [x], {"head": model.head, "idle": nn.Linear(2, 2)}, EVERY_POSITION, samples=2)
    assert set(found) == {"head"}


def test_narrow_readers_see_many_rows_all_the_same():
    module = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(4, 2, 14, 14, generator=torch.Generator().manual_seed(0))
    assert gathered(module, [x], Sampling(1)).n == 4 * 14 * 14  # under the least number of rows: all there are


@pytest.mark.parametrize(
    ("module", "shape", "samples", "positions"),
    [
        (nn.Linear(3000, 1), (2, 500, 3000), 50, 120),  # ceil(2 * 3000 / 50)
        (nn.Linear(7, 1), (2, 500, 7), 50, 82),  # ceil(4096 / 50)
        (nn.Conv2d(400, 1, 3), (2, 400, 30, 30), 50, 144),  # ceil(2 * 3600 / 50)
        (nn.Linear(7, 1), (2, 82, 7), 50, None),
    ],
)
def test_a_reader_looks_at_two_rows_a_column_and_at_least_4096(
    module: nn.Module, shape: tuple[int, ...], samples: int, positions: int | None
):
    total = shape[1] if isinstance(module, nn.Linear) else 28 * 28
    found = Sampling().positions(module, torch.empty(shape), total, 4, samples)
    if positions is None:
        assert found is None
    else:
        assert torch.equal(found, spread_positions(total, positions, 4, 2, 0))
    assert Sampling(None).positions(module, torch.empty(shape), total, 4, samples) is None
