"""Compensate one reader after the other, each on the inputs that the already pruned prefix produces."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modhifi.calibration.collect import MomentCollector
from modhifi.calibration.im2col import reader_rows
from modhifi.calibration.moments import Accumulator, Moments
from modhifi.models.hooks import batch_statistics, only_input
from modhifi.models.loaded import real_tokens
from modhifi.pruning.compensations.lstsq import least_squares_towards
from modhifi.pruning.linalg import mean_diagonal, shrinkage, shrunk
from modhifi.structure.groups import Structure
from modhifi.structure.operators import absorb_mean, kernel_size, weight_matrix, write_weight
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import removed_positions


class _Reached(Exception):
    """Stops a forward pass at the reader: what lies behind it is not needed."""


@contextmanager
def _rows_of(
    module: nn.Module, positions: Callable[[Tensor, int], Tensor | None], keep: Tensor | None
) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def see(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = only_input(args, named).detach()
        found.append(reader_rows(layer, x, lambda total: positions(x, total), keep))
        raise _Reached

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def joint_moments(
    dense: nn.Module,
    pruned: nn.Module,
    name: str,
    run: Callable[[Tensor, nn.Module], object],
    batches: Iterator[Tensor],
    *,
    samples: int,
    rows_per_column: int | None,
    use_batch_statistics: bool,
    seed: int,
) -> Moments:
    """Moments of a reader's inputs in both models side by side: columns ``[x_dense, x_pruned]``, ``(G, 2d, 2d)``."""
    layer = dense.get_submodule(name)
    dealer = MomentCollector({name: layer}, samples=samples, rows_per_column=rows_per_column, seed=seed)
    sums, first = Accumulator(), 0
    with batch_statistics(dense, use_batch_statistics), batch_statistics(pruned, use_batch_statistics):
        for batch in batches:
            dealer.start(first)
            sides = []
            for model in (dense, pruned):
                reader = model.get_submodule(name)
                with _rows_of(reader, lambda x, total: dealer.positions(layer, x, total), real_tokens(batch)) as found:
                    try:
                        run(batch, model)
                    except _Reached:
                        pass
                sides.append(found[0])
            sums.add(torch.cat(sides, 1))
            first += len(batch)
    return sums.finish()


def edit_sequentially(
    dense: nn.Module,
    structure: Structure,
    plan: Plan,
    moments_of: Callable[[nn.Module, str], Moments],
    target: str,
    ridge: float,
    progress: Callable[[str, int, int], None],
) -> tuple[nn.Module, list[tuple[str, float, float]]]:
    """A copy of ``dense`` in its own shapes with every touched reader compensated in order of execution.

    ``moments_of(edited, reader)`` returns :func:`joint_moments`. ``target`` ``own``: the layer's dense weights applied
    to the pruned prefix; ``dense``: the dense model's output (docs/method.md, sequential). Returns the model and, per
    reader, its squared local error and energy.
    """
    edited = copy.deepcopy(dense)
    gone = {name: p for (name, role), p in removed_positions(structure, plan).items() if role == "reader"}
    errors = []
    ordered = [name for name in structure.operators if name in gone]
    for number, name in enumerate(ordered):
        progress("compensating", number, len(ordered))
        both = moments_of(edited, name)
        module = edited.get_submodule(name)
        weight = weight_matrix(module)
        groups, _, d = weight.shape
        kernel = kernel_size(module)
        channels = torch.ones(groups * d // kernel, dtype=torch.bool)
        channels[gone[name]] = False
        kept = channels.view(groups, -1).repeat_interleave(kernel, 1).to(weight.device)
        sink = structure.operators[name].sink
        joint = both.cov if sink is not None else both.gram
        # which input the layer should answer to: the dense model's, or the pruned prefix's own
        want = slice(0, d) if target == "dense" else slice(d, 2 * d)
        share, scale = shrinkage(joint[:, d:, d:], both.n), mean_diagonal(joint[:, d:, d:])
        solved_cross, solved_own = shrunk(joint[:, want, d:], share, scale), shrunk(joint[:, d:, d:], share, scale)
        result, error, energy = torch.empty_like(weight), 0.0, 0.0
        for g in range(groups):
            result[g] = least_squares_towards(weight[g], solved_cross[g], solved_own[g], kept[g], ridge)
            cross, own, goal = joint[g, want, d:], joint[g, d:, d:], joint[g, want, want]
            gain = float(((weight[g] @ goal) * weight[g]).sum())
            error += gain + float(((result[g] @ own - 2 * weight[g] @ cross) * result[g]).sum())
            energy += gain
        write_weight(module, result)
        if sink is not None:
            shift = (weight @ both.mean[:, want, None] - result @ both.mean[:, d:, None]).reshape(-1)
            absorb_mean(edited, name, sink, shift)
        errors.append((name, max(0.0, error), energy))
    progress("compensating", len(ordered), len(ordered))
    return edited, errors
