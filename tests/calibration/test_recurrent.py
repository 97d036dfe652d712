"""What the matrices of recurrent layers read, a step after the other, and least squares over it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_recurrent import CASES, recurrent
from torch import Tensor, nn

import modhifi
from modhifi.calibration.moments import Moments
from modhifi.data.sources import load_samples
from modhifi.models.hooks import attached, on_input
from modhifi.models.load import load_model
from modhifi.pruning.budget import Budget
from modhifi.pruning.compensations.lstsq import least_squares
from modhifi.pruning.prune import prune_model
from modhifi.pruning.readers import applied_second
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.places import operator_at
from modhifi.structure.recurrent import directions


def by_steps(rnn: nn.RNNBase, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of every matrix, ``(batch, steps, columns)``, by a loop over steps; and the layer's output."""
    gates: dict[str, list[Tensor]] = {}
    for layer in range(rnn.num_layers):
        outputs = []
        for own in (d for d in directions(rnn) if d.layer == layer):
            w = {part: getattr(rnn, f"{part}{own.suffix}") for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            project = getattr(rnn, f"weight_hr{own.suffix}", None)
            hidden, cell = x.new_zeros(len(x), rnn.proj_size or rnn.hidden_size), x.new_zeros(len(x), rnn.hidden_size)
            steps = []
            for step in (x.flip(1) if own.reverse else x).unbind(1):
                gates.setdefault(f"weight_ih{own.suffix}", []).append(step)
                gates.setdefault(f"weight_hh{own.suffix}", []).append(hidden)
                a, b = step @ w["weight_ih"].T + w["bias_ih"], hidden @ w["weight_hh"].T + w["bias_hh"]
                if isinstance(rnn, nn.LSTM):
                    i, f, g, o = (a + b).chunk(4, 1)
                    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                    hidden = o.sigmoid() * cell.tanh()
                elif isinstance(rnn, nn.GRU):
                    (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
                    new, z = (an + (ar + br).sigmoid() * bn).tanh(), (az + bz).sigmoid()
                    hidden = (1 - z) * new + z * hidden
                else:
                    hidden = (a + b).tanh()
                if project is not None:
                    gates.setdefault(f"weight_hr{own.suffix}", []).append(hidden)
                    hidden = hidden @ project.T
                steps.append(hidden)
            for name in [n for n in gates if n.endswith(own.suffix) and isinstance(gates[n], list)]:
                rows = torch.stack(gates[name], 1)
                gates[name] = rows.flip(1) if own.reverse else rows  # type: ignore[assignment]
            out = torch.stack(steps, 1)
            outputs.append(out.flip(1) if own.reverse else out)
        x = torch.cat(outputs, 2)
    return gates, x  # type: ignore[return-value]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_each_matrix_reads(name: str) -> None:
    net, x = recurrent(name)
    seen: dict[str, Tensor] = {}
    names = [n for n, p in net.rnn.named_parameters() if p.ndim == 2]
    hooks = [on_input(operator_at(net, f"rnn.{n}"), lambda rows, n=n: seen.update({n: rows})) for n in names]
    with attached(hooks):
        net(x)
    expected, _ = by_steps(net.rnn, net.inputs(x).relu())
    assert set(seen) == set(names)
    for n in names:
        torch.testing.assert_close(seen[n], expected[n])


@torch.no_grad()
def test_least_squares_at_the_recurrent_matrix_and_behind() -> None:
    net, _ = recurrent("lstm")
    net = net.float()
    items = torch.randn(64, 12, 5)
    loaded = load_model(net, example=items[:2])
    samples = load_samples(items, loaded, n=64)
    settings = PruneSettings(only=("rnn.*",), weighting="energy", batch_size=16, rows_per_column=None)
    pruned = prune_model(loaded, samples, Budget("components", 0.5), settings)
    kept = torch.tensor(pruned.plan.kept["rnn.weight_ih_l0"])
    x = torch.stack([samples.load(i) for i in range(64)]).double()
    wide = copy.deepcopy(net).double()
    rows, hidden = by_steps(wide.rnn, wide.inputs(x).relu())
    mask = torch.zeros(10, dtype=torch.bool).index_fill(0, kept, True)
    for inputs, weight, small in (
        (rows["weight_hh_l0"], wide.rnn.weight_hh_l0, pruned.model.rnn.weight_hh_l0),
        (hidden, wide.head.weight, pruned.model.head.weight),
    ):
        flat = inputs.flatten(0, 1)
        centred = flat - flat.mean(0)
        moments = Moments(len(flat), flat.mean(0)[None], (centred.T @ centred / len(flat))[None])
        second = applied_second(moments, "bias")[0]
        expected = least_squares(weight, second, mask, settings.ridge)[:, kept]
        outputs = torch.cat([kept + 10 * gate for gate in range(4)]) if len(small) == 4 * len(kept) else slice(None)
        torch.testing.assert_close(small.double(), expected[outputs], rtol=1e-3, atol=1e-4)


def test_a_recurrent_net_is_pruned_saved_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, _ = recurrent("gru, deep, both ways")
    net = net.float()
    items = torch.randn(48, 12, 5)
    more = dict(samples=32, evaluation_samples=16, method={"only": ["rnn.*"], "round_to": 1})
    small = modhifi.prune(net, items, ratio=0.5, out=tmp_path / "small", **more)
    assert small.model.rnn.hidden_size == 5 and small.model.head.in_features == 10
    assert next(rung.note for rung in small.bounds.rungs if rung.name == "R1 theorem form") == "gru at rnn"
    again = modhifi.load(tmp_path / "small", skeleton=net)
    with torch.no_grad():
        assert torch.equal(again(items), small.model(items))
