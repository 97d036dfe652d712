from __future__ import annotations

import pytest
import torch
from tiny_timm import samples_of
from torch import nn

from modhifi.calibration.prefix_cache import Passes
from modhifi.models.load import load_model
from modhifi.unlearning import wide
from modhifi.unlearning.sites import find_sites

OUT, SIDE = 4, 8


@pytest.mark.parametrize(
    ("most", "step", "spacing"),
    # 11 samples: at most 5 rows take every third of each population and one position; 100 rows take 9 of 64 positions.
    [(5, 3, 64), (11, 1, 64), (12, 1, 64), (100, 1, 8), (10_000, 1, 1)],
)
def test_rows_of_a_wide_writer_are_spread_over_samples_and_positions(
    monkeypatch: pytest.MonkeyPatch, most: int, step: int, spacing: int
) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, OUT, 1), nn.ReLU(), nn.Conv2d(OUT, 6, 1), nn.ReLU()]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()
    images = torch.randn(12, 3, SIDE, SIDE)
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 2, 2, 0])
    groups = torch.where(classes == 1, 1, 0)
    groups[2] = -1
    loaded = load_model(net, example=images[:2])
    writer = find_sites(loaded).writers[0]
    monkeypatch.setattr(wide, "MOST_COLUMNS", most + OUT)
    runs = Passes(loaded, net, samples_of(images, classes), 5)
    found = wide.spanned_moments(runs, groups, classes, writer, None)

    taken = sorted(i for j in (0, 1) for i in torch.nonzero(groups == j).flatten().tolist()[::step])
    inputs = images[taken].flatten(2)[:, :, ::spacing].transpose(1, 2)
    with torch.no_grad():
        streams = net[:2](images[taken]).flatten(2)[:, :, ::spacing].transpose(1, 2).double()
    torch.testing.assert_close(found.inputs, inputs.flatten(0, 1))
    for j, moments in enumerate(found.joint.moments):
        rows = streams[groups[taken] == j].flatten(0, 1)
        assert moments.n == len(rows)
        torch.testing.assert_close(moments.mean[0][-OUT:], rows.mean(0))
        torch.testing.assert_close(moments.cov[0][-OUT:, -OUT:], torch.cov(rows.T, correction=0))
    kept = [c for c in (0, 2) if c in classes[taken]]
    means = torch.stack([streams[(groups[taken] == 0) & (classes[taken] == c)].mean((0, 1)) for c in kept])
    torch.testing.assert_close(found.joint.class_means[:, -OUT:], means)
    counts = torch.tensor([int(((groups[taken] == 0) & (classes[taken] == c)).sum()) for c in kept]).double()
    torch.testing.assert_close(found.joint.shares, counts / counts.sum())
