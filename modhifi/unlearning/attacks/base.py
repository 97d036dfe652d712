"""What every attack says of itself, what it is given, and where it registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from modhifi.calibration.prefix_cache import Passes
from modhifi.data.labels import populations
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.registry import Registry
from modhifi.unlearning.data import UnlearnData
from modhifi.unlearning.observe import Observed

# What an attack needs of the model, from the least on: the order of an audit's tables.
NEEDS = ("outputs", "features", "members")


@dataclass(frozen=True)
class Attacked:
    """A model under attack and all that an attack may use.

    ``model`` has the architecture of ``loaded``; ``unsettled`` is the model before its norms were settled, where it is
    known. ``fit`` and ``test`` are what it gives on ``data.fit``, from which attacks learn, and on ``data.test``;
    ``original_test`` is what the original gives there. ``original_head`` is the original's classifier, None for a model
    of other features. ``members``: training images of the forgotten ``classes``, where there are any. ``earlier``
    classes, forgotten in rounds before, count as neither forgotten nor retained.
    """

    loaded: LoadedModel
    model: nn.Module
    unsettled: nn.Module | None
    fit: Observed
    test: Observed
    original_test: Observed
    original_head: nn.Module | None
    data: UnlearnData
    classes: Sequence[int]
    earlier: Sequence[int] = ()
    members: Samples | None = None
    batch_size: int = 64

    @cached_property
    def labels(self) -> Tensor:
        """The classes of the test samples, int64 ``(n,)``."""
        return labels_of(self.data.test)

    @cached_property
    def forgotten(self) -> Tensor:
        """Which test samples are of the forgotten classes, bool ``(n,)``."""
        return populations(self.data.test, self.classes, self.earlier) > 0

    @cached_property
    def retained(self) -> Tensor:
        """Which test samples are of the classes that stay, bool ``(n,)``."""
        return populations(self.data.test, self.classes, self.earlier) == 0

    @cached_property
    def lesson(self) -> tuple[Tensor, Tensor]:
        """What an attack on the features learns from: rows ``(m, d)`` and their classes, int64 ``(m,)``."""
        used = populations(self.data.fit, self.classes, self.earlier) >= 0
        return self.fit.features[used], labels_of(self.data.fit)[used]

    def recognised(self, predicted: Tensor, chosen: Tensor) -> float:
        """The share of the ``chosen`` test samples, bool ``(n,)``, whose class was ``predicted``, int64 ``(n,)``."""
        return share(predicted[chosen], self.labels[chosen])

    def logits(self, model: nn.Module, samples: Samples) -> Tensor:
        """One more pass: the outputs ``(n, classes)`` of a model of this architecture, float32."""
        return torch.cat([run().float().cpu() for _, run in Passes(self.loaded, model, samples, self.batch_size)])


def labels_of(samples: Samples) -> Tensor:
    """The classes of labelled samples, int64 ``(n,)``."""
    assert samples.labels is not None
    return samples.labels


def share(predicted: Tensor, labels: Tensor) -> float:
    """The share of entries that agree."""
    return float((predicted == labels).double().mean())


@dataclass(frozen=True)
class Measure:
    """A figure of an attack: its ``label`` in tables and its unit, ``%`` for a share of images.

    ``headline``: it also stands among the figures before and after.
    """

    key: str
    label: str
    unit: Literal["%", "nats"] = "%"
    headline: bool = True


@dataclass(frozen=True)
class Attack:
    """A way to get a forgotten class back, or to tell how much of it is left.

    ``needs`` is one of :data:`NEEDS`. ``run`` gives a value for the key of each of its ``measures``, a share in [0, 1]
    unless the unit says otherwise; None where it cannot be measured.
    """

    name: str
    summary: str
    needs: Literal["outputs", "features", "members"]
    measures: tuple[Measure, ...]
    run: Callable[[Attacked], Mapping[str, float | None]]
    source: str = ""


ATTACKS: Registry[Attack] = Registry("attack")


def measures() -> dict[str, Measure]:
    """Every figure of an audit by its key, in the order of its tables."""
    order = sorted(ATTACKS.values(), key=lambda entry: NEEDS.index(entry.needs))
    return {measure.key: measure for entry in order for measure in entry.measures}
