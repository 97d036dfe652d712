"""The writers of a stream, their place in it, and the joint rows."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from tiny_timm import convnext, linear_resnet, resnet, samples_of, swin, vit
from torch import Tensor, nn

from modhifi.calibration.prefix_cache import Passes
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.structure.tracing.branches import Calls
from modhifi.unlearning.batchnorm import settle_norms
from modhifi.unlearning.edit import forget
from modhifi.unlearning.moments import Populations, joint_moments, reader_moments
from modhifi.unlearning.observe import observe
from modhifi.unlearning.settings import UnlearnSettings
from modhifi.unlearning.sites import block_of, find_sites
from modhifi.unlearning.writer_edits import writer_scale


def test_a_writer_is_the_last_operator_of_its_branch() -> None:
    sites = find_sites(load_model(resnet()))
    assert [w.site.module for w in sites.writers] == [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]
    assert [w.norm for w in sites.writers] == [f"layer{i}.0.bn2" for i in (1, 2, 3, 4)]
    assert sites.heads == ("fc",) and sites.focus is None
    assert sites.last(2) == ("layer3.0", "layer4.0")
    # The downsampling conv of a block belongs to it, and the classifier comes last.
    assert [s.module for s in sites.readers if s.block == "layer4.0"][-1] == "layer4.0.downsample.1"
    assert sites.readers[-1].module == "fc"


def test_a_stream_is_taken_where_it_is_read() -> None:
    loaded = load_model(resnet())
    sites = find_sites(loaded)
    caught: list[Tensor] = []
    with torch.no_grad(), Calls({w.call: lambda out: caught.append(out.clone()) for w in sites.writers}):
        loaded.logits(loaded.example)
    assert len(caught) == 4
    assert all(float(stream.min()) == 0.0 for stream in caught)
    with torch.no_grad():
        assert torch.equal(loaded.model.forward_features(loaded.example), caught[-1])


def test_a_class_token_is_the_only_position_the_classifier_reads() -> None:
    sites = find_sites(load_model(vit()))
    assert sites.focus is not None and sites.focus.tolist() == [0]
    assert [w.site.module for w in sites.writers if w.site.block == "blocks.1"] == [
        "blocks.1.attn.proj",
        "blocks.1.mlp.fc2",
    ]


def test_layer_scale_stands_between_writer_and_stream() -> None:
    sites = find_sites(load_model(convnext()))
    assert {w.gains for w in sites.writers} == {(f"stages.{i}.blocks.0.gamma",) for i in range(4)}


def test_a_gated_branch_is_refused_and_not_guessed() -> None:
    sites = find_sites(load_model(timm.create_model("seresnet18", num_classes=5)))
    assert not sites.writers
    assert all("no operator alone" in reason for _, reason in sites.refused)


def test_a_net_without_skips_writes_its_own_outputs() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    sites = find_sites(load_model(net, example=torch.randn(2, 3, 8, 8)))
    assert [w.site.module for w in sites.writers] == ["0", "3"]
    assert not any(w.joined for w in sites.writers)
    # Both are read behind their activation, the first behind its norm too.
    assert [w.norm for w in sites.writers] == ["1", None]
    assert [w.bent for w in sites.writers] == [True, True] and not sites.straight


def test_a_regression_model_has_no_class_to_forget() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    with pytest.raises(ModhifiError, match="no classes to forget"):
        find_sites(load_model(net, example=torch.randn(2, 3, 2, 2)))


@pytest.mark.parametrize("build", [swin, vit, convnext, linear_resnet])
def test_each_row_joins_a_writers_input_with_what_its_output_is_added_to(build: object) -> None:
    """Where the skip is silenced, the stream is scale * (W x + b) + shift at the very same position."""
    model = build().eval()  # type: ignore[operator]
    loaded = load_model(model)
    sites = find_sites(loaded)
    torch.manual_seed(1)
    size = loaded.example.shape[1:]
    samples = samples_of(torch.randn(6, *size), torch.tensor([0, 0, 0, 1, 1, 1]))
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    for writer in sites.writers[-2:]:
        layer = loaded.model.get_submodule(writer.site.module)
        retain = joint_moments(Passes(loaded, loaded.model, samples, 4), groups, groups, writer, None).moments[0]
        plain = layer.weight.detach().clone()
        # Adding c W to the writer moves the stream by c * scale * W x: the cross moments must say so.
        with torch.no_grad():
            layer.weight.mul_(2.0)
        moved = joint_moments(Passes(loaded, loaded.model, samples, 4), groups, groups, writer, None).moments[0]
        with torch.no_grad():
            layer.weight.copy_(plain)
        d = plain[0].numel()
        scale = writer_scale(loaded.model, writer)
        gain = torch.ones(len(plain), dtype=torch.float64) if scale is None else scale
        expected = gain[:, None] * (plain.double().flatten(1) @ retain.gram[0][:d, :d])
        found = moved.gram[0][d:, :d] - retain.gram[0][d:, :d]
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def test_populations_are_kept_apart() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    loaded = load_model(net, example=torch.randn(2, 4))
    inputs = torch.arange(24.0).view(6, 4)
    groups = torch.tensor([0, 1, 0, 2, -1, 0])
    found = reader_moments(Passes(loaded, loaded.model, samples_of(inputs, groups), 4), groups, ["1"])["1"]
    assert [m.n for m in found] == [3, 1, 1]
    for j, moments in enumerate(found):
        assert torch.allclose(moments.mean[0], inputs[groups == j].double().mean(0))


def test_every_population_looks_at_eight_rows_a_column() -> None:
    populations = Populations(torch.tensor([0] * 10 + [1] * 5 + [-1]))
    # Seven columns want 56 rows: 12 positions of each of five samples, 6 of each of ten.
    assert populations.positions(0, 16, 100, 7).shape == (16, 12)
    assert populations.positions(0, 16, 9, 7).shape == (16, 9)
    rows = torch.randn(1, 7, 16, 12)
    populations.add(0, rows)
    for moments, seen in zip(populations.moments(), (rows[0, :, :10, :6], rows[0, :, 10:15]), strict=True):
        assert moments.n == 60
        assert torch.allclose(moments.mean[0], seen.double().mean((1, 2)))


def test_block_names() -> None:
    assert block_of("layer4.1.conv2") == "layer4.1"
    assert block_of("blocks.11.mlp.fc2") == "blocks.11"
    assert block_of("head.fc") == "head.fc"


@pytest.mark.parametrize("build", [swin, vit, convnext])
def test_writers_of_layernorm_nets_take_a_class_out_of_what_the_classifier_reads(build: object) -> None:
    loaded = load_model(build().eval())  # type: ignore[operator]
    sites = find_sites(loaded)
    torch.manual_seed(2)
    labels = torch.tensor([0, 1] * 60)
    tint = torch.tensor([1.0, -1.0, 0.5]).view(3, 1, 1)
    inputs = torch.randn(120, *loaded.example.shape[1:]) + labels[:, None, None, None] * tint
    samples = samples_of(inputs, labels)
    # Nothing bends what these streams carry, so one pass is the default.
    assert sites.straight and forget(loaded, sites, samples, labels, UnlearnSettings(depth=1), [1]).values.passes == 1
    found = forget(loaded, sites, samples, labels, UnlearnSettings(depth=1, passes=2), [1])
    assert not found.left_out and found.values.passes == 2

    def gap(model: nn.Module) -> float:
        features = observe(loaded, model, sites, samples, 60).features
        return float((features[labels == 1].mean(0) - features[labels == 0].mean(0)).norm())

    assert gap(found.model) < 0.35 * gap(loaded.model)


class TokenNorms(nn.Module):
    """A BatchNorm over images and one over tokens, which stand in rows of their own as LeViT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
        self.mix, self.token_norm, self.head = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.mix(self.norm(self.stem(x)).flatten(2).transpose(1, 2))
        return self.head(self.token_norm(tokens.flatten(0, 1)).view(tokens.shape).mean(1))


def test_norms_settled_on_a_part_are_those_settled_on_that_part_alone() -> None:
    torch.manual_seed(3)
    model = TokenNorms().eval()
    loaded = load_model(model, example=torch.randn(2, 3, 4, 4))
    labels = torch.tensor([0, 1, 0, 0, 1, 0, 1])
    samples = samples_of(torch.randn(7, 3, 4, 4), labels)
    names = ["norm", "token_norm"]
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    settle_norms(Passes(loaded, first, samples, 3), names, labels == 0)
    settle_norms(Passes(loaded, second, samples.subset([0, 2, 3, 5]), 3), names)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert not torch.allclose(first.token_norm.running_mean, model.token_norm.running_mean)
