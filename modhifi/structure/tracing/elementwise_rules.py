"""Rules for operations in which components meet, or move to other places: sums, products of activations, reshapes."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.structure.operators import last_wide
from modhifi.structure.torch_ops import JOINS, PLACED, RESHAPES, SUMS, Axis, Call, Grid, constant
from modhifi.structure.tracing.watcher import Watcher


class Meetings(Watcher):
    """A watcher that knows which components an operation couples."""

    def binary(self, call: Call) -> list[Axis | Grid | None]:
        dims = call.outputs[0].ndim
        places = [(t, {d: d + dims - t.ndim for d in range(t.ndim)}) for t in call.inputs]
        return self.couple(call, places, "sum" if call.name in SUMS else None)

    def matrix_product(self, call: Call) -> list[Axis | Grid | None]:
        """Batch axes (heads) meet one another, rows and columns pass; what is summed over must stay."""
        if len(call.inputs) != 2 or min(t.ndim for t in call.inputs) < 2:
            return self.unknown(call)
        dims, places = call.outputs[0].ndim, []
        reverse = call.name == "__rmatmul__"
        for number, tensor in enumerate(reversed(call.inputs) if reverse else call.inputs):
            free = tensor.ndim - 2 + number  # the rows of the first, the columns of the second factor
            place = {d: d + dims - tensor.ndim for d in (*range(tensor.ndim - 2), free)}
            places.append((tensor, place))
        return self.couple(call, places, "heads")

    def attention(self, call: Call) -> list[Axis | Grid | None]:
        """Heads of queries, keys, values and mask meet; with grouped queries each key-value head meets several."""
        dims = call.outputs[0].ndim
        names = ("query", "key", "value", "attn_mask")
        tensors = [call.argument(number, name) for number, name in enumerate(names)]
        places = [(t, {d: d + dims - t.ndim for d in range(t.ndim - 2)}) for t in tensors if isinstance(t, Tensor)]
        return self.couple(call, places, "heads", grouped=bool(call.argument(7, "enable_gqa", False)))

    def couple(
        self, call: Call, places: list[tuple[Tensor, dict[int, int]]], mark: str | None, grouped: bool = False
    ) -> list[Axis | Grid | None]:
        """Unite the components that several tensors carry along one axis of the output.

        ``places`` maps each tensor's axes to the output's; an axis that is not there is summed over. ``grouped`` lets
        each component of a shorter axis meet several neighbours on the longer one.
        """
        out = call.outputs[0]
        met: list[tuple[int, Tensor]] = []
        for tensor, place in places:
            axis = call.axis(tensor)
            if axis is None:
                continue
            if axis.dim not in place:
                self.freeze(axis, f"'{call.name}' sums over these channels")
                continue
            dim, ids = place[axis.dim], axis.ids
            if grouped and out.shape[dim] % len(ids) == 0:
                ids = ids.repeat_interleave(out.shape[dim] // len(ids))
            if len(ids) == out.shape[dim]:
                met.append((dim, ids))
            else:
                self.freeze(axis, "a single channel multiplies all others")
        made = [(dim, ids) for dim, ids in met if not self.couplings.is_loose(ids)] or met
        if not made:
            return [None] * len(call.outputs)
        dim, first = made[0]
        if any(other != dim for other, _ in made):
            return self.refuse(call, "two tensors with channels on different axes are combined")
        for other, ids in met:
            if other != dim:  # a parameter along another axis, such as a norm's inside each head
                self.freeze(Axis(other, ids), "a parameter spans another axis")
        for tensor, place in places:
            here = next((d for d, o in place.items() if o == dim), None)
            if here is not None and call.axis(tensor) is None and tensor.shape[here] > 1:
                if id(tensor) in self.parameters or not constant(tensor, here):
                    return self.refuse(call, "a fixed or unknown tensor spans these channels")
        others = [ids for other, ids in met if other == dim and ids is not first]
        for ids in others:
            self.couplings.unite(first, ids)
        if mark == "sum" and any(not torch.equal(ids, first) for ids in others):
            self.couplings.mark(first, mark)
        if mark == "heads" and dim < out.ndim - 2:
            self.couplings.mark(first, mark)
        return [Axis(dim, first)] * len(call.outputs)

    def move(self, call: Call) -> list[Axis | Grid | None]:
        unknown = [t for t in call.inputs if t.ndim > 0 and self.is_unknown(call, t)]
        if unknown and call.name not in JOINS:
            return self.unknown(call)  # joined with something that carries no components
        moved = call.moved()
        results = [r for r in moved if r is not None and bool((r.ids >= 0).any())]
        split = any(isinstance(r, Grid) for r in results) and not call.grids
        if len(results) < sum(t.numel() > 0 for t in call.outputs) or (split and call.name not in RESHAPES):
            return self.refuse(call, f"'{call.name}' folds these channels into another shape")
        if call.name in PLACED and not self.placed(call, call.records[0][1].ids.flatten(), results):
            return self.refuse(call, f"'{call.name}' takes these channels from fixed places")
        return [self.collapse(r) if split and isinstance(r, Grid) else r for r in moved]

    @staticmethod
    def is_unknown(call: Call, tensor: Tensor) -> bool:
        """Whether a tensor carries no components, and is no index either, which takes elements off other axes."""
        return call.axes.get(id(tensor)) is None and (tensor.is_floating_point() or call.name != "__getitem__")

    def collapse(self, grid: Grid) -> Axis | Grid:
        """A reshape has spread components over several axes: let those that differ in the last one live as one.

        So the channels of an attention head become one component where ``(..., H * D)`` is seen as ``(..., H, D)``.
        """
        dim = last_wide(grid.ids)
        heads = grid.ids.narrow(dim, 0, 1)
        self.couplings.unite(heads.expand_as(grid.ids).flatten(), grid.ids.flatten())
        wide = [d for d, size in enumerate(heads.shape) if size > 1]
        return Axis(wide[0], heads.flatten()) if len(wide) == 1 else Grid(heads)

    def placed(self, call: Call, source: Tensor, results: list[Axis | Grid]) -> bool:
        """Allow an operation that names places on the components' axis: equal chunks, or as many of every component."""
        if all(torch.equal(r.ids.flatten(), source) for r in results):
            return True
        pieces = [r.ids.flatten() for r in results]
        if call.name == "chunk" and not call.grids and torch.equal(torch.cat(pieces), source):
            if len({len(piece) for piece in pieces}) == 1:
                self.couplings.chunk(source, len(pieces))
                return True
        for piece in pieces:
            taken = torch.isin(source, piece)
            if not torch.equal(source[taken], piece):
                return False
            if not bool(taken.all()):
                reason = f"'{call.name}' takes these channels from fixed places ({self.where})"
                self.couplings.take(source, taken, reason)
        return True
