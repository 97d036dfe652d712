import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from modhifi.calibration.accumulator import Accumulator
from modhifi.calibration.gram_quality import gram_quality, gram_warnings
from modhifi.calibration.moments import Moments
from modhifi.cli.main import app
from modhifi.data.contact_sheet import contact_sheet
from modhifi.data.inversion import improve, inverted, patch_likeness
from modhifi.data.quality import look, statistics_gap
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.structure.clone import clone


@pytest.fixture(scope="module")
def small():
    """A small conv net whose BatchNorms remember noise of half the usual scale."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    model[1].momentum = model[4].momentum = None
    with torch.no_grad():
        for _ in range(4):
            model(0.5 * torch.randn(16, 3, 16, 16))
    return load_model(model.eval(), example=torch.randn(2, 3, 16, 16))


def test_the_gap_is_zero_for_the_remembered_moments_and_counts_deviations():
    norm = nn.BatchNorm1d(3).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.running_var.fill_(4.0 - norm.eps)
    assert float(statistics_gap(norm.running_mean, norm.running_var, norm)) == pytest.approx(0, abs=1e-12)
    # one deviation off in the mean of every channel, and twice the deviation
    assert float(statistics_gap(norm.running_mean + 2, norm.running_var, norm)) == pytest.approx(1, rel=1e-5)
    assert float(statistics_gap(norm.running_mean, torch.full((3,), 16.0), norm)) == pytest.approx(1, rel=1e-4)


def test_look_pools_all_batches_and_sees_the_predictions(small):
    samples = load_samples("synthetic:gaussian", small, n=24, balanced=False)
    found = look(small, samples, batch_size=7)
    stem = torch.stack([samples.load(i) for i in range(24)])
    with torch.no_grad():
        x = small.model[0](stem)
        predicted = small.logits(stem).argmax(1)
    expected = statistics_gap(x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), small.model[1])
    assert found["norm_gap"]["1"] == pytest.approx(float(expected), rel=1e-4)
    assert found["mean_norm_gap"] == pytest.approx(sum(found["norm_gap"].values()) / len(found["norm_gap"]))
    counts = torch.bincount(predicted, minlength=4).double()
    share = counts[counts > 0] / 24
    assert found["classes"] == [int((counts > 0).sum()), 4]
    assert found["balance"] == pytest.approx(float(-(share * share.log()).sum()) / math.log(4))


def test_grams_of_too_few_rows_and_of_one_direction_are_told():
    def of(rows):
        sums = Accumulator()
        sums.add(rows[None])
        return sums.finish()

    torch.manual_seed(0)
    moments = {
        "wide": of(torch.randn(64, 16)),
        "full": of(torch.randn(16, 4000)),
        "still": of(torch.randn(16, 1) * torch.randn(1, 400)),
    }
    found = {q.reader: q for q in gram_quality(moments)}
    assert found["full"].rank == pytest.approx(16, rel=0.02) and found["still"].rank == pytest.approx(1, rel=1e-3)
    short, still = gram_warnings(tuple(found.values()), 8)
    assert "wide, 16 rows for 64" in short and "--samples 32" in short and "1 of 3" in short
    assert "still" in still
    white = Moments(99, torch.zeros(1, 16), torch.eye(16, dtype=torch.float64)[None])
    assert gram_quality({"a": white})[0].rank == pytest.approx(16)
    assert gram_warnings(gram_quality({"a": white}), 8) == []


def test_a_cache_that_cannot_be_written_costs_only_the_cache(small, tmp_path):
    (tmp_path / "file").write_text("")
    assert len(inverted(small, 4, 0, steps=1, cache=tmp_path / "file" / "cache")) == 4


def test_inverted_images_fit_the_memory_better_and_change_no_weight(small, tmp_path, monkeypatch):
    before = {k: v.clone() for k, v in small.model.state_dict().items()}
    start = load_samples("synthetic", small, n=20, balanced=False)
    found = inverted(small, 20, 0, steps=6, cache=tmp_path)
    assert look(small, found)["mean_norm_gap"] < 0.9 * look(small, start)["mean_norm_gap"]
    assert all(torch.equal(v, before[k]) for k, v in small.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in small.model.parameters())
    assert found.synthetic and sorted(set(found.labels.tolist())) == [0, 1, 2, 3]
    assert found.labels.bincount().tolist() == [5] * 4
    contact_sheet(found, small)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_ino
    again = inverted(small, 20, 0, steps=6, cache=tmp_path)
    assert again.fingerprint() == found.fingerprint() and file.stat().st_ino == stamp
    file.write_bytes(b"cut")
    assert inverted(small, 20, 0, steps=6, cache=tmp_path).fingerprint() == found.fingerprint()
    # Far from the norms they are treated as synthetic, near them as real ones.
    gap = look(small, found)["mean_norm_gap"]
    for limit, adapted in ((0.9 * gap, True), (1.1 * gap, False)):
        monkeypatch.setattr("modhifi.data.inversion.MATCHED", limit)
        again = inverted(small, 20, 0, steps=6, cache=tmp_path)
        assert again.synthetic and again.adapted == again.subset([1, 2]).adapted == adapted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_any_type_is_inverted(small, dtype):
    other = replace(small, model=clone(small.model).to(dtype))
    start = load_samples("synthetic", other, n=20, balanced=False)
    assert look(other, inverted(other, 20, 0, steps=6))["mean_norm_gap"] < 0.9 * look(other, start)["mean_norm_gap"]


def test_an_inversion_that_was_ended_goes_on_behind_its_last_batch(small, tmp_path, monkeypatch):
    monkeypatch.setattr("modhifi.data.inversion.BATCH", 4)
    whole, batches = inverted(small, 12, 0, steps=2), []

    def told(_: str, done: int, total: int) -> None:
        if done > 4 and not batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inverted(small, 12, 0, steps=2, cache=tmp_path, progress=told)
    monkeypatch.setattr("modhifi.data.inversion.improve", lambda *a: batches.append(len(a[1])) or improve(*a))
    assert inverted(small, 12, 0, steps=2, cache=tmp_path).fingerprint() == whole.fingerprint()
    assert batches == [4, 4]
    # More of them begin with the same.
    more = inverted(small, 16, 0, steps=2, cache=tmp_path)
    assert batches == [4, 4, 4] and more.hashes[:12] == whole.hashes


def test_patches_of_a_transformer_come_to_differ():
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    loaded = load_model("timm:vit_tiny_patch16_224", pretrained=False, model_args=options)
    seen = []
    handle = loaded.model.blocks[-1].norm1.register_forward_hook(lambda m, a, out: seen.append(patch_likeness(out)))
    images = 0.05 * torch.randn(4, 3, 16, 16)
    bound = torch.full((3, 1, 1), 3.0)
    loaded.logits(images)
    handle.remove()
    better = improve(loaded, images, None, -bound, bound, steps=10)
    handle = loaded.model.blocks[-1].norm1.register_forward_hook(lambda m, a, out: seen.append(patch_likeness(out)))
    loaded.logits(better)
    handle.remove()
    assert float(seen[1]) < float(seen[0]) and better.abs().max() <= 3


def test_a_network_without_memory_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    loaded = load_model(model, example=torch.randn(2, 3, 8, 8))
    with pytest.raises(ModhifiError, match="no norms that remember"):
        inverted(loaded, 4, 0, steps=1)
    convnext = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": 3}
    loaded = load_model("timm:convnext_tiny", pretrained=False, model_args=convnext)  # LayerNorms, over pixels alone
    with pytest.raises(ModhifiError, match="no norms that remember"):
        inverted(loaded, 2, 0, steps=1)


def test_data_make_writes_what_a_run_can_read(tmp_path):
    def modhifi(*words):
        done = CliRunner().invoke(app, [*words])
        return done.exit_code, done.output

    words = ["data", "make", "demo:resnet", "--n", "6", "--out", f"{tmp_path}/made", "--sheet", f"{tmp_path}/sheet.png"]
    code, said = modhifi(*words)
    assert code == 0 and "predicted classes" in said and (tmp_path / "sheet.png").is_file(), said
    assert len(load_samples(f"images:{tmp_path / 'made'}", load_model("demo:resnet"), n=50)) == 6
    code, said = modhifi(*words)
    assert code == 2 and "not empty" in said
    code, said = modhifi("data", "make", "demo:resnet", "--kind", "synthetic:nothing", "--out", f"{tmp_path}/other")
    assert code == 2 and "invert" in said and not (tmp_path / "other").exists()
