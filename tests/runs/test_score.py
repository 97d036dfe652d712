"""The scores of a model: Subset Fidelity of what goes last, and their pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_readers import residual
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import modhifi
from modhifi.cli.main import app
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.pruning import readers as readers_module
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import choose_groups, find_structure, measure_moments
from modhifi.runs.score import GroupScores


def scores(cost: list[float], rank: list[int], total: float = 10.0) -> GroupScores:
    n = len(cost)
    zeros = torch.zeros(n, dtype=torch.float64)
    return GroupScores(
        "g", "channels", zeros, zeros, torch.tensor(cost, dtype=torch.float64), torch.tensor(rank), total
    )


def test_subset_fidelity_is_what_the_components_that_go_last_leave() -> None:
    found = scores([float("inf"), 1.0, 7.0, 3.0], [4, 0, 2, 1])
    torch.testing.assert_close(found.subset_fidelity(), torch.tensor([0.0, 0.3, 0.7, 0.9, 1.0], dtype=torch.float64))
    assert [found.hifi_size(eta) for eta in (0.2, 0.5, 0.7, 0.9, 1.0)] == [1, 2, 2, 3, 4]
    assert found.hifi_share(0.5) == 0.5
    heads = scores([float("inf"), float("inf"), 1.0], [3, 3, 0])
    assert heads.subset_fidelity()[1].isnan() and heads.hifi_size(0.1) == 2


@pytest.mark.parametrize("selector", ["obs", "random"])
def test_subset_fidelity_is_that_of_least_squares_on_what_is_left(selector: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = torch.randn(24, 3, 10, 10)
    loaded = load_model(net, example=data[:2])
    (found,) = modhifi.score(loaded, data, samples=24, selector=selector, layers=["*"])
    settings = PruneSettings(batch_size=32)
    structure = choose_groups(find_structure(loaded), settings)
    moments = measure_moments(loaded, structure, load_samples(data, loaded, n=24), settings.sampling)
    readers = readers_module.readers_of(loaded.model, structure, structure.prunable[0], moments)
    curve = found.subset_fidelity()
    for k in range(1, 6):
        removed = torch.nonzero(found.rank < 6 - k).flatten()
        expected = 1 - residual(readers, removed, ridge=1e-4) / found.total
        assert float(curve[k]) == pytest.approx(expected, abs=1e-3)
    (channels,) = found.channels
    assert torch.equal(channels.singleton.amax(0), found.singleton)  # the maximum over output channels
    assert float(channels.energy.sum()) == pytest.approx(found.total)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ModhifiError, match="'nothing' matches no prunable group"):
        modhifi.score("demo:resnet", "demo:calibration", layers=["nothing"])


def test_score_prints_hifi_shares_and_writes_pictures(model_dir: Path, image_dir: Path, tmp_path: Path) -> None:
    given = ["score", str(model_dir), "--data", f"images:{image_dir}", "--samples", "24", "--quiet"]
    page, picture, tensors = (tmp_path / name for name in ("a.html", "a.png", "a.safetensors"))
    options = ["--layer", "layer1.0.conv1", "--plot", str(page), "--out", str(tensors)]
    shown = CliRunner().invoke(app, [*given, *options])
    assert shown.exit_code == 0, shown.output
    for text in (
        "η = 0.8",
        "k = 25 %",
        "output channels that read layer1.0.conv1",
        "20 % of the components or fewer reach",
    ):
        assert text in shown.output
    html = page.read_text("utf-8")
    assert html.count("<svg ") == 4 and "Similarity of the components of layer1.0.conv1" in html
    assert 'src="' not in html and 'href="http' not in html  # one page, without network
    content = load_file(tensors)
    n = len(content["layer1.0.conv1.singleton"])
    assert content["layer1.0.conv1.similarity"].shape == (n, n)
    assert content["layer1.0.conv1.subset_fidelity"].shape == (n + 1,)
    assert content["layer1.0.conv1.channels.0.layer1.0.conv2.hifi_size.0.8"].dtype == torch.int64
    done = CliRunner().invoke(app, [*given, "--plot", str(picture), "--selector", "naive", "--json"])
    entries = json.loads(done.stdout)
    assert Image.open(picture).size[0] > 1000
    assert set(entries[0]["hifi_share"]) == {"0.5", "0.8", "0.9"} and "channels" not in entries[0]
    refused = CliRunner().invoke(app, [*given, "--plot", str(tmp_path / "a.pdf")])
    assert refused.exit_code == 2
