"""Matrix work by hand counts, kernel by kernel, and what sizes predict of it against what runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tiny
import tiny_transformers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modhifi
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.pruning.stages import find_structure
from modhifi.runs import measure
from modhifi.structure.flops import counting
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import shrink
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import _last


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def recurrent(kind: type[nn.RNNBase], **settings: object) -> Callable[[], Tensor]:
    return lambda: kind(3, 5, batch_first=True, **settings).eval()(draw(2, 7, 3))[0]


def packed(kind: type[nn.RNNBase]) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(draw(2, 7, 3), torch.tensor([7, 4]), batch_first=True)
    return kind(3, 5, batch_first=True).eval()(rows)[0].data


ENCODER = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
# Of 2 samples of 7 steps: queries, keys, values and what gathers them; scores and their product with the values.
MHA = 2 * 7 * 4 * 8 * 8 + 2 * (2 * 7 * 7 * 8)
A, B = draw(2, 7, 8), draw(2, 8, 4)
KERNELS: dict[str, tuple[Callable[[], object], int]] = {
    "linear": (lambda: nn.Linear(8, 3)(A), 2 * 7 * 8 * 3),
    "linear without bias": (lambda: nn.Linear(8, 3, bias=False)(A), 2 * 7 * 8 * 3),
    "conv 1d": (lambda: nn.Conv1d(7, 6, 3)(A), 2 * 6 * 6 * 7 * 3),
    "conv 2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1)(draw(2, 4, 9, 9)), 2 * 5 * 5 * 6 * 4 * 9),
    "conv 3d": (lambda: nn.Conv3d(4, 6, 2)(draw(2, 4, 5, 5, 5)), 2 * 4**3 * 6 * 4 * 8),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2)(draw(2, 4, 9, 9)), 2 * 7 * 7 * 6 * 2 * 9),
    "depthwise conv": (lambda: nn.Conv2d(4, 8, 3, groups=4)(draw(2, 4, 9, 9)), 2 * 7 * 7 * 8 * 9),
    "dilated conv": (lambda: nn.Conv2d(4, 6, 3, dilation=2)(draw(2, 4, 9, 9)), 2 * 5 * 5 * 6 * 4 * 9),
    # every input element meets every weight of its channel
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2)(draw(2, 4, 5, 5)), 2 * 5 * 5 * 4 * 6 * 9),
    "grouped transposed conv": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2)(draw(2, 4, 5)), 2 * 5 * 4 * 3 * 3),
    "matmul": (lambda: A @ B, 2 * 7 * 8 * 4),
    "mm": (lambda: torch.mm(A[0], B[0]), 7 * 8 * 4),
    "addmm": (lambda: torch.addmm(draw(4), A[0], B[0]), 7 * 8 * 4),
    "bmm": (lambda: torch.bmm(A, B), 2 * 7 * 8 * 4),
    "baddbmm": (lambda: torch.baddbmm(draw(2, 7, 4), A, B), 2 * 7 * 8 * 4),
    "addbmm": (lambda: torch.addbmm(draw(7, 4), A, B), 2 * 7 * 8 * 4),
    "einsum": (lambda: torch.einsum("bij,bjk->bik", A, B), 2 * 7 * 8 * 4),
    "einsum of three": (lambda: torch.einsum("bij,bjk,kl->bil", A, B, draw(4, 3)), 2 * 7 * 8 * 4 + 2 * 7 * 4 * 3),
    "tensordot": (lambda: torch.tensordot(A, A, dims=([2], [2])), 14 * 8 * 14),
    "mv": (lambda: A[0] @ B[0, :, 0], 7 * 8),
    "addmv": (lambda: torch.addmv(draw(7), A[0], B[0, :, 0]), 7 * 8),
    "dot": (lambda: A[0, 0] @ A[0, 1], 8),
    "bilinear": (lambda: nn.Bilinear(8, 8, 3)(A, A), 2 * 7 * 3 * 8 * 8),
    "sdpa": (lambda: F.scaled_dot_product_attention(A[:, None], A[:, None], A[:, None]), 2 * 2 * 7 * 7 * 8),
    "causal sdpa": (lambda: F.scaled_dot_product_attention(A, A, A, is_causal=True), 2 * 2 * 7 * 7 * 8),
    "grouped sdpa": (
        lambda: F.scaled_dot_product_attention(draw(2, 6, 7, 8), A[:, None], A[:, None], enable_gqa=True),
        2 * 2 * 6 * 7 * 7 * 8,
    ),
    "lstm": (recurrent(nn.LSTM), 2 * 7 * 4 * 5 * (3 + 5)),
    "lstm of two layers": (recurrent(nn.LSTM, num_layers=2), 2 * 7 * 4 * 5 * (3 + 5 + 5 + 5)),
    "lstm both ways": (recurrent(nn.LSTM, bidirectional=True), 2 * 2 * 7 * 4 * 5 * (3 + 5)),
    "lstm with projection": (recurrent(nn.LSTM, proj_size=2), 2 * 7 * (4 * 5 * (3 + 2) + 5 * 2)),
    "gru": (recurrent(nn.GRU), 2 * 7 * 3 * 5 * (3 + 5)),
    "rnn": (recurrent(nn.RNN), 2 * 7 * 5 * (3 + 5)),
    "lstm of packed rows": (lambda: packed(nn.LSTM), 11 * 4 * 5 * (3 + 5)),
    "lstm cell": (lambda: nn.LSTMCell(3, 5)(draw(2, 3)), 2 * 4 * 5 * (3 + 5)),
    "multi-head attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True).eval()(A, A, A), MHA),
    "transformer layer": (lambda: copy.deepcopy(ENCODER).eval()(A), MHA + 2 * 7 * 2 * 8 * 12),
    "transformer": (lambda: nn.TransformerEncoder(ENCODER, 2).eval()(A), 2 * (MHA + 2 * 7 * 2 * 8 * 12)),
    "a scan by hand": (lambda: torch.cumsum(A * A.exp(), 1).sum(), 0),
    "norms and pooling": (
        lambda: F.max_pool1d(nn.BatchNorm1d(7).eval()(F.layer_norm(A, (7, 8), A[0], A[1]).softmax(-1)), 2),
        0,
    ),
    "movements": (lambda: torch.cat([torch.stack([A, A]).gather(0, A[None].long() * 0).flatten(0, 1), A]), 0),
}


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_work_of_every_kernel_by_hand(kernel: str) -> None:
    run, macs = KERNELS[kernel]
    with counting() as counter:
        run()
    assert (counter.total, list(counter.uncounted)) == (2 * macs, [])


def test_fused_kernels_are_off_only_while_counting() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with counting():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


@torch.library.custom_op("test_flops::mix", mutates_args=())
def mix(x: Tensor) -> Tensor:
    return x @ x.mT @ x


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "test_flops::mix": lambda x: mix(x),
    "aten::_cdist_forward": lambda x: torch.cdist(x, x),
    "aten::linalg_inv_ex": lambda x: torch.linalg.inv(x @ x.mT + torch.eye(x.shape[1])) @ x,
    "aten::_fft_r2c": lambda x: torch.fft.rfft(x, dim=1).abs(),
}


class Mixed(nn.Module):
    """A function of the samples' rows before two linear maps."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.up, self.down = function, nn.LazyLinear(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.function(x)).relu()).mean(1)


@pytest.mark.parametrize("kernel", UNKNOWN)
def test_a_kernel_without_a_formula_refuses_a_flops_budget(kernel: str) -> None:
    torch.manual_seed(0)
    model, x = Mixed(UNKNOWN[kernel]).eval(), draw(24, 5, 6)
    model(x)
    assert find_structure(load_model(model, example=x[:2])).uncounted == (kernel,)
    with pytest.raises(ModhifiError, match=f"no formula tells the work of {kernel}; give --ratio or --params"):
        modhifi.prune(model, x, flops="0.7x")
    pruned = modhifi.prune(model, x, ratio=0.5, samples=16, checks={"walked": 0})
    assert f"FLOPs leave out {kernel}, whose work no formula tells" in pruned.report["warnings"]


class Recurrent(nn.Module):
    """A small convolution before a wide recurrent layer, which has nearly all the work."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 1)
        self.lstm, self.head = nn.LSTM(4, 64, batch_first=True), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.second(self.first(x).relu()).mT)[0][:, -1])


class Encoder(nn.Module):
    """torch's own transformer layers, which it fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 5)
        self.layers = nn.TransformerEncoder(ENCODER, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x.mT)).mean(1))


def test_a_flops_budget_counts_what_cannot_be_pruned() -> None:
    torch.manual_seed(0)
    model, x = Recurrent().eval(), draw(24, 3, 9)
    macs = 9 * (8 * 3 * 3 + 4 * 8) + 9 * 4 * 64 * (4 + 64) + 64 * 5
    assert measure.count_flops(model, x) == 2 * macs
    alone = {"exclude": ["lstm*"]}  # whose hidden units can go
    with pytest.raises(ModhifiError, match="no allocation keeps only 0.7x of the FLOPs.* 0.9"):
        modhifi.prune(model, x, flops="0.7x", method={"selector": "magnitude", **alone})
    pruned = modhifi.prune(model, x, ratio=0.5, samples=16, checks={"walked": 0}, method=alone)
    before, after = pruned.report["size"]["flops"]
    assert before == 2 * macs and 0.9 < after / before < 1
    assert pruned.report["budget"]["reached"]["macs"] == after / before


OWN = {"recurrent": Recurrent, "encoder": Encoder}


@pytest.mark.parametrize("name", [*tiny.PATTERNS, *OWN, *tiny_transformers.FAMILIES, *tiny_transformers.TIMM])
def test_predicted_work_is_what_runs(name: str) -> None:
    torch.manual_seed(0)
    if name in OWN:
        model, x = OWN[name]().eval().requires_grad_(False), draw(2, 3, 9)
    elif name in tiny.PATTERNS:
        model, x = tiny.pattern(name)
    run: Callable[[nn.Module], object] = lambda model: model(x)  # noqa: E731
    if name in tiny_transformers.FAMILIES or name in tiny_transformers.TIMM:
        model, x, run = tiny_transformers.family(name)

    def work(model: nn.Module) -> float:
        with torch.no_grad(), counting() as counter:
            run(model)
        assert not counter.uncounted
        return counter.total / 2 / len(x)

    structure = trace(model, run)
    sizes, plan = sizes_of(model, structure), Plan({g.name: _last(g, 0.5) for g in structure.prunable})
    widths = {name: len(kept) for name, kept in plan.kept.items()}
    assert not structure.uncounted and sizes.macs({}) == work(model)
    if name != "own forward":  # whose group the trial cut refuses
        assert sizes.macs(widths) == pytest.approx(work(shrink(copy.deepcopy(model), structure, plan)), rel=1e-12)
