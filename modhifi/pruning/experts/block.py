"""One mixture on a few tokens: what it computes with fewer experts, and matrices fitted to what it computed before."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from modhifi.calibration.routed import Rows, watched
from modhifi.errors import ModhifiError
from modhifi.models.hooks import attached
from modhifi.pruning.linalg import factorise, mean_diagonal, shrinkage, shrunk
from modhifi.structure.clone import clone
from modhifi.structure.mixtures import Mixture
from modhifi.structure.places import operator_at
from modhifi.structure.plan import Plan
from modhifi.structure.stacked import Stacked
from modhifi.structure.surgery import shrink
from modhifi.structure.torch_ops import tensors_in

# How often every expert is fitted to what the others leave.
SWEEPS = 2


class Block:
    """A mixture, a module of its own, with tokens that it reads, ``x`` ``(T, H)``, and what it makes of them, ``y``."""

    def __init__(self, mixture: Mixture, module: nn.Module, x: Tensor, ridge: float) -> None:
        self.mixture, self.module, self.x, self.ridge = mixture, module, x, ridge
        self.y = self.run(module)

    @torch.no_grad()
    def run(self, module: nn.Module) -> Tensor:
        """The outputs of a mixture of the same form, ``(T, H)``.

        Raises ModhifiError where it does not run on tokens alone.
        """
        try:
            out = next(tensors_in(module(self.x[None])))
        except Exception as error:
            raise ModhifiError(f"the mixture {self.mixture.block} does not run on tokens alone: {error}") from error
        return out.reshape(self.x.shape)

    def read(self, module: nn.Module) -> tuple[Tensor, Rows]:
        """The outputs of a mixture of the same form, and what its experts read, those of one expert together."""
        pieces: list[Rows] = []
        stack = self.stack(module)
        with attached(watched(stack, pieces.append, lambda tokens: None)):
            out = self.run(module)
        if any(piece.tokens is None for piece in pieces) or not pieces:
            raise ModhifiError(f"which tokens the experts of {self.mixture.block} read could not be followed")
        gates = [torch.ones_like(p.rows[:, :1]) if p.gates is None else p.gates for p in pieces]
        tokens = [piece.tokens for piece in pieces if piece.tokens is not None]
        whole = Rows(
            torch.cat([p.rows for p in pieces]),
            torch.cat([p.products for p in pieces]),
            torch.cat([p.experts for p in pieces]),
            torch.cat(tokens),
            torch.cat(gates),
        )
        return out, whole

    @cached_property
    def routed(self) -> Rows:
        """What the experts of the whole mixture read."""
        return self.read(self.module)[1]

    def stack(self, module: nn.Module) -> Stacked:
        """The matrices that read the experts' neurons."""
        operator = operator_at(module, self.mixture.inside(self.mixture.reader))
        assert isinstance(operator, Stacked)
        return operator

    def keeping(self, there: Tensor) -> nn.Module:
        """A copy with only the experts that are ``there``, bool ``(E,)``."""
        structure = self.mixture.own
        kept = tuple(there.nonzero().flatten().tolist())
        return shrink(clone(self.module), structure, Plan({structure.groups[0].name: kept}))

    def without(self, there: Tensor, expert: int) -> nn.Module:
        """A copy with the experts that are ``there`` but for one."""
        rest = there.clone()
        rest[expert] = False
        return self.keeping(rest)

    def error(self, module: nn.Module) -> float:
        """``E‖y(x) − ŷ(x)‖²`` over the tokens."""
        return float((self.run(module) - self.y).double().square().sum(1).mean())

    @torch.no_grad()
    def fit(self, module: nn.Module) -> None:
        """Fit the matrices of all experts, in place, by least squares with a ridge, so that the mixture gives ``y``.

        Block Gauss-Seidel: each expert's matrix in turn takes what all others leave of its tokens. An expert of few
        tokens moves less: its Gram is shrunk as `modhifi.pruning.readers.applied_second` does it.
        """
        out, read = self.read(module)
        matrices = self.stack(module).matrices
        assert read.tokens is not None
        left = (self.y - out).double()
        members = [torch.nonzero(read.experts == e).flatten() for e in range(len(matrices))]
        rows, change = read.weighted.double(), torch.zeros_like(matrices, dtype=torch.float64)
        factors = {e: self._factor(rows[at]) for e, at in enumerate(members) if len(at)}
        for _ in range(SWEEPS):
            for expert, factor in factors.items():
                at = members[expert]
                own, tokens = rows[at], read.tokens[at]
                step = torch.cholesky_solve(own.T @ left[tokens], factor).T
                change[expert] += step
                left.index_add_(0, tokens, own @ step.T, alpha=-1)
        matrices.data.copy_(matrices.double() + change)

    def _factor(self, rows: Tensor) -> Tensor:
        """The Cholesky factor of an expert's Gram, damped."""
        gram = (rows.T @ rows)[None]
        return factorise(shrunk(gram, shrinkage(gram, len(rows)), mean_diagonal(gram))[0], self.ridge)[0]
