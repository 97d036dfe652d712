"""Several sources of data: how they are written, how their items are put together, and what their moments are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_text
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import modhifi
from modhifi.bounds.held_out import tabulate
from modhifi.calibration.cache import MomentCache
from modhifi.calibration.collect import collect
from modhifi.calibration.im2col import reader_rows
from modhifi.calibration.low_rank import as_tensor
from modhifi.calibration.sampling import Sampling
from modhifi.cli.main import app
from modhifi.data.in_memory import from_items, source_name
from modhifi.data.mixture import Mixture, mixed
from modhifi.data.samples import Samples, describe_data
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.hooks import batch_statistics, on_input
from modhifi.models.load import load_model
from modhifi.pruning import stages
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model
from modhifi.pruning.sequential import PairedPasses, written_modules
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import find_structure, measure_moments
from modhifi.runs.defaults import calibrating, complete, complete_heal
from modhifi.runs.inputs import Given, load_data, local_paths, located
from modhifi.runs.recipes.prune import ModelSource
from modhifi.runs.recipes.tasks import parse
from modhifi.runs.reports.measurements import before_after
from modhifi.structure.operators import weight_matrix

# Files that are there, whose names look like several sources or like a share.
PRESENT = ("plain.txt", "a,b.txt", "at@2x.txt", "half@0.5", "one,self", "x,text:y@0.1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in PRESENT:
        (tmp_path / name).write_text(tiny_text.articles(12))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "sources", "shares"),
    [
        ("self", ["self"], [1]),
        ("self,text:plain.txt@0.2", ["self", "text:plain.txt"], [0.8, 0.2]),
        (
            "self@0.3, text:plain.txt, synthetic:invert@.1",
            ["self", "text:plain.txt", "synthetic:invert"],
            [0.3, 0.6, 0.1],
        ),
        ("self,synthetic,demo:test", ["self", "synthetic", "demo:test"], [1 / 3] * 3),
        ("hf:org/some:train@0.25,self", ["hf:org/some:train", "self"], [0.25, 0.75]),
        ("text:missing.txt@0.5,text:plain.txt@0.5", ["text:missing.txt", "text:plain.txt"], [0.5, 0.5]),
        ("text:no,such.txt", ["text:no,such.txt"], [1]),
        ("images:icons@2x", ["images:icons@2x"], [1]),
        *[(f"text:{name}", [f"text:{name}"], [1]) for name in PRESENT],
        ("self,text:one,self@0.4", ["self", "text:one,self"], [0.6, 0.4]),
        ("text:a,b.txt@0.4,self", ["text:a,b.txt", "self"], [0.4, 0.6]),
        ("text:half@0.5@0.1,self", ["text:half@0.5", "self"], [0.1, 0.9]),
    ],
)
def test_sources_and_shares_are_read(folder: Path, text: str, sources: list[str], shares: list[float]) -> None:
    mixture = Mixture.of(text)
    assert list(mixture.sources) == sources and mixture.shares == pytest.approx(shares)
    assert Mixture.of([f"{source}@{share}" for source, share in mixture]).shares == pytest.approx(shares)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("self,text:plain.txt@0", "the share in 'text:plain.txt@0' is 0; give one above 0 and at most 1"),
        ("self,text:plain.txt@20", "the share in 'text:plain.txt@20' is 20; give one above 0"),
        ("self@nan,synthetic", "the share in 'self@nan' is nan; give one above 0"),
        ("self@0.5,text:plain.txt@0.2", "add up to 0.7; let them add up to 1, or leave one out"),
        ("self@0.9,text:plain.txt@0.2", "add up to 1.1; let them add up to 1"),
        ("self@0.9,synthetic@0.1,text:plain.txt", "add up to 1 and leave nothing for the rest; lower them"),
    ],
)
def test_bad_shares_are_told(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ModhifiError, match=re.escape(message)):
        parse({"task": "prune", "model": {"name": "x"}, "budget": {"ratio": 0.5}, "data": text})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("self,", "unknown data source 'self,'; use "),
        ("self,nothing:x", "unknown data source 'self,nothing:x'; use"),
        ("self,self", "every sample of self is also one of another source; leave it out"),
        ("self,text:missing.txt", "no text at missing.txt"),
    ],
)
def test_a_bad_source_among_several_is_told(folder: Path, text: str, message: str) -> None:
    loaded = load_model(tiny_text.llama())
    with pytest.raises(ModhifiError, match=re.escape(message)):
        modhifi.score(replace(loaded, tokenizer=tiny_text.tokenizer()), text, samples=4, window=16)


def test_a_bad_share_ends_a_command_with_one_line() -> None:
    result = CliRunner().invoke(app, ["prune", "demo:resnet", "--data", "synthetic@2,demo:test", "--ratio", "0.2"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "the share in 'synthetic@2'" in result.stderr


@pytest.mark.parametrize(
    ("source", "together"),
    [
        ("text:a", ["text:a", "self"]),
        ("text:a@0.2", ["text:a@0.2", "self"]),
        (["text:a", "text:b@0.1"], ["text:a", "text:b@0.1", "self"]),
        ("text:a@1", "text:a@1"),
        (["text:a@0.3", "text:b@0.7"], ["text:a@0.3", "text:b@0.7"]),
        (["self", "text:a"], ["self", "text:a"]),
        ("hf:a", "hf:a"),
        ("self", "self"),
    ],
)
def test_files_of_text_are_mixed_with_what_a_causal_model_writes(
    source: str | list[str], together: str | list[str]
) -> None:
    loaded = load_model(tiny_text.llama())
    found, remarks = calibrating(source, loaded, alone=False)
    assert found == together and len(remarks) == (found != source)
    assert calibrating(source, loaded, alone=True) == (source, [])
    assert calibrating(source, replace(loaded, kind="encoder"), alone=False) == (source, [])
    given = parse({"task": "prune", "model": {"name": "x"}, "budget": {"ratio": 0.5}, "data": source})
    completed, _ = complete(given, loaded, "cpu")
    assert completed.data.source == together
    alone = given.model_copy(update={"data": given.data.model_copy(update={"only_this_data": True})})
    assert complete(alone, loaded, "cpu")[0].data.source == source
    for only, expected in ((False, together), (True, source)):
        recipe = parse({"task": "heal", "directory": "x", "data": {"source": source, "only_this_data": only}})
        healing, remarks = complete_heal(recipe, loaded, "cpu", ModelSource(name="x"))
        assert healing.data.source == expected and len(remarks) == (expected != source)


def test_shares_and_sources_go_together() -> None:
    assert Mixture(["self", "synthetic"], [0.25, None]).shares == (0.25, 0.75)
    assert Mixture(["self", "synthetic", "demo:test"]).counts(32) == [11, 11, 11]
    assert Mixture(["self", "synthetic"], [0.99, 0.01]).counts(16) == [16, 1]
    for sources, shares in (([], None), (["self"], [0.5, 0.5]), (["self", "synthetic"], [-1, 2])):
        with pytest.raises(ModhifiError, match="share"):
            Mixture(sources, shares)


def some(n: int, first: int = 0, synthetic: bool = False) -> Samples:
    """Tensors of 3 × 6 × 6 pixels that are numbered from ``first`` on."""
    items = [torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(first + i)) for i in range(n)]
    return replace(from_items(items, None, n=n, seed=0), synthetic=synthetic)


def test_the_first_items_are_in_the_shares_and_sources_come_apart_again() -> None:
    real, drawn = some(40), some(40, first=100, synthetic=True)
    both = mixed([("real", 0.8, real), ("drawn", 0.2, drawn)])
    assert len(both) == 80 and sum(own == 1 for own in both.origin[:25]) == 5
    assert both.synthetic and torch.equal(both.load(0), real.load(0))
    for samples in (both, both.subset(range(80))):
        (share, first), (other, second) = samples.by_source()
        assert (share, other) == (0.8, 0.2) and (first.adapted, second.adapted) == (False, True)
        assert [first.fingerprint(), second.fingerprint()] == [real.fingerprint(), drawn.fingerprint()]
    one_source = both.subset([i for i, own in enumerate(both.origin) if own == 1][:3])
    assert [(share, len(samples)) for share, samples in one_source.by_source()] == [(1.0, 3)]
    common = mixed([("real", 0.5, real), ("more", 0.5, some(45))])
    assert len(common) == 45 and len(set(common.hashes)) == 45


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    for norm in (model[1], model[4]):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
    return model.eval()


def rows_of(model: nn.Module, reader: str, samples: Samples, size: int) -> Tensor:
    """All rows that a reader sees, ``(d, r)``, under batch statistics where the samples ask for them."""
    rows: list[Tensor] = []
    module = model.get_submodule(reader)
    with on_input(module, lambda x: rows.append(reader_rows(module, x))), batch_statistics(model, samples.adapted):
        with torch.no_grad():
            for batch in samples.batches(size):
                model(batch)
    return torch.cat(rows, 2)[0].double()


SHARES = (0.7, 0.3)


@pytest.fixture
def sources() -> list[Samples]:
    return [some(11), some(6, first=50, synthetic=True)]


@pytest.mark.parametrize("reader", ["3", "8"])
def test_moments_are_those_of_all_rows_weighed(sources: list[Samples], reader: str) -> None:
    """A row of a source weighs its share over the source's rows, and least squares on moments is that of the rows."""
    loaded = modhifi.load_model(net(), example=torch.zeros(2, 3, 6, 6))
    samples = mixed([(name, share, own) for name, share, own in zip("ab", SHARES, sources, strict=True)])
    moments = measure_moments(loaded, find_structure(loaded), samples, Sampling(None, batch_size=4))[reader]
    rows = [rows_of(loaded.model, reader, own, 4) for own in sources]
    weight = torch.cat([torch.full((r.shape[1],), s / r.shape[1]).double() for s, r in zip(SHARES, rows, strict=True)])
    x = torch.cat(rows, 1)
    torch.testing.assert_close(moments.mean[0], x @ weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.gram[0], (x * weight) @ x.T, rtol=1e-5, atol=1e-6)
    assert moments.n == round(float(1 / weight.square().sum()))
    kept, target = slice(0, len(x) // 2), torch.arange(len(x)).double() @ x
    solved = torch.linalg.solve(moments.gram[0, kept, kept], moments.gram[0, kept] @ torch.arange(len(x)).double())
    root = weight.sqrt()
    by_rows = torch.linalg.lstsq(x[kept].T * root[:, None], (target * root)[:, None]).solution[:, 0]
    torch.testing.assert_close(solved, by_rows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("few_rows", [False, True])
def test_paired_moments_are_those_of_all_rows_weighed(sources: list[Samples], few_rows: bool) -> None:
    loaded = modhifi.load_model(net(), example=torch.zeros(2, 3, 6, 6))
    sources = [replace(own, synthetic=False) for own in sources]
    samples = mixed([(name, share, own) for name, share, own in zip("ab", SHARES, sources, strict=True)])
    edited = net()
    with torch.no_grad():
        edited[0].weight.mul_(0.5)
    passes = PairedPasses(loaded, edited, ["3", "8"], samples, Sampling(None, batch_size=4))
    passes.advance(written_modules(find_structure(loaded), ["3", "8"]), ["8"])
    paired = passes.moments("3", torch.arange(45)[None], few_rows)
    layer = loaded.model.get_submodule("3")
    mean, target, second, cross = (torch.zeros(size, dtype=torch.float64) for size in (45, 6, (45, 45), (6, 45)))
    for share, own in zip(SHARES, sources, strict=True):
        x = rows_of(edited, "3", own, 4)
        y = weight_matrix(layer)[0] @ rows_of(loaded.model, "3", own, 4)
        count = x.shape[1]
        mean, target = mean + share * x.mean(1), target + share * y.mean(1)
        second, cross = second + share * (x @ x.T) / count, cross + share * (y @ x.T) / count
    for got, wanted in (
        (paired.mean[0], mean),
        (paired.target[0], target),
        (as_tensor(paired.cov)[0], second - torch.outer(mean, mean)),
        (paired.cross[0], cross - torch.outer(target, mean)),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_other_shares_and_a_further_source_need_no_second_pass(
    sources: list[Samples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = modhifi.load_model(net(), example=torch.zeros(2, 3, 6, 6))
    structure, measured = find_structure(loaded), list[int]()

    def counting(model: nn.Module, run: object, batches: object, *more: object, **named: object) -> object:
        items = [batch for batch in batches]  # type: ignore[attr-defined]
        measured.extend(map(len, items))
        return collect(model, run, items, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "collect", counting)

    def measure(*parts: tuple[str, float, Samples], cache: MomentCache | None = None) -> tuple[Tensor, int]:
        measured.clear()
        cache = cache or MomentCache(tmp_path)
        moments = measure_moments(loaded, structure, mixed(parts), Sampling(None, batch_size=4), cache=cache)
        return moments["3"].cov, sum(measured)

    a, b = sources
    _, alone = measure(("a", 1.0, a))
    first, more = measure(("a", 0.7, a), ("b", 0.3, b))
    second, nothing = measure(("a", 0.2, a), ("b", 0.8, b))
    assert (alone, more, nothing) == (11, 6, 0) and not torch.equal(first, second)
    fresh, _ = measure(("a", 0.2, a), ("b", 0.8, b), cache=MomentCache(tmp_path / "other"))
    torch.testing.assert_close(second, fresh, rtol=1e-12, atol=1e-12)


def test_block_by_block_is_the_same_as_at_once(tmp_path: Path) -> None:
    loaded = load_model(tiny_text.save(tmp_path / "model"))
    (tmp_path / "text.txt").write_text(tiny_text.articles(12))
    parts = [load_samples(spec, loaded, n=6, window=16) for spec in ("self", f"text:{tmp_path / 'text.txt'}")]
    samples = mixed([("self", 0.9, parts[0]), ("text", 0.1, parts[1])])
    settings = PruneSettings(rows_per_column=None, batch_size=2, layout="uniform", only=("neurons",))
    budget = Budget("components", 0.5)
    in_blocks = prune_model(loaded, samples, budget, settings)
    at_once = prune_model(loaded, samples, budget, settings, cache=MomentCache(tmp_path / "cache"))
    assert in_blocks.plan.kept == at_once.plan.kept
    for one, two in zip(in_blocks.errors, at_once.errors, strict=True):
        assert one.error == pytest.approx(two.error, rel=1e-6)


def test_held_out_samples_are_in_the_shares_and_measured_by_source(folder: Path) -> None:
    loaded = replace(load_model(tiny_text.llama()), tokenizer=tiny_text.tokenizer())
    data = {"source": "self,text:half@0.5@0.2", "samples": 8, "evaluation_samples": 10, "window": 16}
    recipe = parse({"task": "prune", "model": {"name": "x"}, "budget": {"ratio": 0.5}, "data": data})
    assert recipe.data.source == ["self", "text:half@0.5@0.2"]
    calibration, held = load_data(recipe, loaded)
    assert [(share, len(part)) for share, part in calibration.by_source()] == [(0.8, 8), (0.2, 8)]
    assert not set(calibration.hashes) & set(held.hashes)
    parts = held.by_source()
    assert [(share, len(part)) for share, part in parts] == [(0.8, 8), (0.2, 2)]
    other = load_model(tiny_text.llama(initializer_range=0.2)).model
    whole = tabulate(loaded, other, held, 4)
    for number, (_, part) in enumerate(parts):
        own = whole.subset([i for i, origin in enumerate(held.origin) if origin == number])
        assert own.perplexities() == pytest.approx(tabulate(loaded, other, part, 4).perplexities(), rel=1e-5)
    other_data = recipe.data.model_copy(update={"evaluate": "text:half@0.5"})
    again, only_text = load_data(recipe.model_copy(update={"data": other_data}), loaded)
    assert len(only_text) == 10 and not only_text.sources and not set(again.hashes) & set(only_text.hashes)


def test_the_report_has_a_row_for_every_source() -> None:
    errors = {"agreement": 0.9, "relative_error": 0.1, "perplexity_before": 2.0, "perplexity_after": 3.0}
    size = {"flops": [2, 1], "parameters": [2, 1], "bytes": [2, 1]}
    timed = {"median": 1.0, "ratio": 1.0, "ratio_iqr": 0.0}
    report = {"errors": errors, "size": size, "latency": {"before": timed, "after": timed}, "throughput": None}
    alone = [row["name"] for row in before_after(report)]
    assert [row["change"] for row in before_after(report) if row["before"] is None] == ["needs 3 full batches held out"]
    assert alone[:3] == ["perplexity", "next-token agreement with the original", "FLOPs per sample"]
    sources = [{"source": "self", **errors}, {"source": "text:x", **errors, "perplexity_after": 5.0}]
    rows = before_after(report | {"errors": errors | {"sources": sources}})
    assert [row["name"] for row in rows[2:6]] == [
        f"{figure}, {name}" for name in ("self", "text:x") for figure in alone[:2]
    ]
    assert rows[4]["after"] == 5.0


def test_the_manifest_says_the_shares() -> None:
    both = mixed([("a", 0.8, some(4)), ("b", 0.2, some(4, first=9))])
    assert describe_data(both)["shares"] == {"a": 0.8, "b": 0.2} and "shares" not in describe_data(some(4))


@pytest.mark.parametrize(
    "data",
    [["self", "text:plain.txt@0.2"], {"source": ["self", "text:plain.txt@0.2"]}, "self,text:plain.txt@0.2"],
)
def test_a_recipe_takes_a_list(folder: Path, data: object) -> None:
    recipe = parse({"task": "prune", "model": {"name": "x"}, "budget": {"ratio": 0.5}, "data": data})
    assert recipe.data.source == ["self", "text:plain.txt@0.2"]
    assert Path("plain.txt") in {path.relative_to(".") for path in local_paths(recipe.model_dump())}
    assert located(recipe.data.source) == ["self", f"text:{folder}/plain.txt@0.2"]


def test_python_mixes_what_it_holds_with_sources(image_dir: Path, model_dir: Path) -> None:
    own = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = modhifi.Mixture([own, f"images:{image_dir}"], [0.25, None])
    assert source_name(both) == ["python:Tensor@0.25", f"images:{image_dir}@0.75"]
    data = {"source": source_name(both), "samples": 8, "evaluation_samples": 8}
    recipe = parse({"task": "prune", "model": {"name": "x"}, "budget": {"ratio": 0.5}, "data": data})
    loaded = load_model(model_dir)
    for samples, counts in zip(load_data(recipe, loaded, Given(data=both)), ([8, 8], [2, 6]), strict=True):
        assert [(source.name, source.share) for source in samples.sources] == [
            ("python:Tensor", 0.25),
            (f"images:{image_dir}", 0.75),
        ]
        assert [len(part) for _, part in samples.by_source()] == counts
    # what is learnt from has no moments to weigh: the shares are those of the samples
    learnt = parse({"task": "heal", "directory": "d", "budget": {"steps": 1}, "data": data})
    samples, _ = load_data(learnt, loaded, Given(data=both))
    assert [len(part) for _, part in samples.by_source()] == [2, 6]
    with pytest.raises(ModhifiError, match="heal mix several sources"):
        load_samples(Mixture(["synthetic", f"images:{image_dir}"]), loaded, n=4)
