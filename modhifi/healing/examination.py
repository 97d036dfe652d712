"""What a student says of samples that it does not learn from, against what its teacher says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from modhifi.calibration.memory import loaded_once
from modhifi.data.samples import Samples
from modhifi.healing.losses import agreement, output_loss
from modhifi.healing.teacher import Teacher
from modhifi.models.loaded import LoadedModel
from modhifi.structure.outputs import classes_last, spread_of


class Examination:
    """Compares students with ``original`` on ``samples``, a batch of ``size`` at a time; ``closed`` classes apart.

    What the original says is kept where it fits; it runs in full precision.
    """

    def __init__(self, original: LoadedModel, samples: Samples, size: int, closed: Sequence[int]) -> None:
        self.original, self.samples, self.size, self.closed = original, loaded_once(samples), size, tuple(closed)
        self.teacher = Teacher(original, {}, len(samples), keep=True)
        self.spread = self._spread() if original.gives_values else None

    @torch.no_grad()
    def _spread(self) -> float:
        """The spread of the original's values, one for all batches: those of a few items may hardly differ."""

        def outputs() -> Iterator[tuple[Tensor, Tensor | None]]:
            first = 0
            for batch in self.samples.batches(self.size):
                values, _ = self.teacher.outputs(batch, range(first, first + len(batch)))
                yield values, self.original.real_tokens(batch)
                first += len(batch)

        return spread_of(outputs())

    @torch.no_grad()
    def figures(self, student: nn.Module) -> dict[str, float | None]:
        """The mean ``divergence`` in nats, the ``agreement`` as a share and its standard ``error``.

        Of values the divergence is that of :func:`output_loss` for them, and there is no agreement.
        """
        original, values = self.original, self.original.gives_values
        divergence, agreed, count, compared = 0.0, 0.0, 0, 0
        for batch in self.samples.batches(self.size):
            wanted, _ = self.teacher.outputs(batch, range(count, count + len(batch)))
            output, real = original.logits(batch, student), original.real_tokens(batch)
            real = None if real is None else real.to(output.device)
            distance = output_loss(wanted, output, real, spread=self.spread, closed=self.closed)
            divergence += len(batch) * float(distance)
            agreed += len(batch) * (0.0 if values else float(agreement(wanted, output, real, self.closed)))
            count += len(batch)
            compared += classes_last(output)[..., 0].numel() if real is None else int(real.sum())
        agreed /= count
        return {
            "divergence": divergence / count,
            "agreement": None if values else agreed,
            "error": math.sqrt(max(0.0, agreed * (1 - agreed)) / compared),
        }
