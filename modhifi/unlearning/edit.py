"""Make a classifier forget classes: collect moments, edit an operator, collect again; forward passes only."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from modhifi.calibration.moments import Moments
from modhifi.calibration.prefix_cache import Passes
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.pruning.fidelity import singleton_fidelity
from modhifi.structure.operators import absorb_mean, columns_of, conv_groups, weight_matrix, write_weight
from modhifi.unlearning import methods
from modhifi.unlearning.batchnorm import settle_norms
from modhifi.unlearning.methods import Edit
from modhifi.unlearning.moments import Joint, joint_moments, reader_moments
from modhifi.unlearning.sites import MOST_COLUMNS, Site, Sites, Writer
from modhifi.unlearning.wide import spanned_moments

Method = Literal["erase-writers", "erase", "gls", "hifi-zero", "hifi-negate", "contrastive", "projection", "head-mask"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class Defaults:
    """``depth`` blocks back from the head, ``passes`` over them, and the ``strength`` in the method's own unit."""

    depth: int
    passes: int
    strength: float
    unit: str


DEFAULTS: dict[str, Defaults] = {
    "erase-writers": Defaults(3, 3, 1.0, "share of the way to the full edit"),
    "erase": Defaults(1, 1, 1.0, "share of the way to the full edit"),
    "gls": Defaults(2, 1, 1.0, "weight of forgetting against retaining, in units of tr R / tr F"),
    "hifi-zero": Defaults(2, 1, 0.03, "share of the weights"),
    "hifi-negate": Defaults(2, 1, 0.03, "share of the weights"),
    "contrastive": Defaults(2, 1, 0.03, "share of the weights"),
    "projection": Defaults(2, 1, 10.0, "scale of the forget space; that of the retain space is ten times it"),
    "head-mask": Defaults(1, 1, 1.0, "share of the way to the full edit"),
}
# Of erase-writers where no activation bends what is written: nothing is left for a second pass, and a third block costs
# the other classes more than it takes from the forgotten one (eval/results/unlearn_swin.md).
STRAIGHT = Defaults(2, 1, 1.0, DEFAULTS["erase-writers"].unit)


@dataclass(frozen=True)
class UnlearnSettings:
    """How to forget; None takes the method's own default (:data:`DEFAULTS`, :data:`STRAIGHT`).

    ``only``: shell patterns of operators to edit in place of those of the last ``depth`` blocks. Of erase-writers
    alone: ``exact`` makes the class means of the stream coincide, ``forget_weight`` is the forgotten samples' share of
    the pooled moments, ``class_weight`` how much more the means of the retained classes count than their samples.
    ``damping`` is in units of a moment matrix's mean diagonal.
    """

    method: Method = "erase-writers"
    depth: int | None = None
    passes: int | None = None
    strength: float | None = None
    only: tuple[str, ...] = ()
    exact: bool = True
    forget_weight: float = 0.1
    class_weight: float = 10.0
    damping: float = 1e-3
    settle: bool = True
    batch_size: int = 64

    def filled(self, straight: bool) -> Defaults:
        """Depth, passes and strength that apply; ``straight`` as :attr:`modhifi.unlearning.sites.Sites.straight`."""
        own = STRAIGHT if straight and self.method == "erase-writers" else DEFAULTS[self.method]
        return Defaults(
            own.depth if self.depth is None else self.depth,
            own.passes if self.passes is None else self.passes,
            own.strength if self.strength is None else self.strength,
            own.unit,
        )


@dataclass(frozen=True)
class Record:
    """One edit: the operator, the relative change of its weight in the Frobenius norm, the damping used."""

    module: str
    change: float
    damping: float | None


@dataclass(frozen=True)
class Forgotten:
    """``model`` has forgotten; ``plain`` is the same function before its norms were settled; ``left_out``: operators
    that could not be edited, with the reason; ``values``: depth, passes and strength that applied."""

    model: nn.Module
    plain: nn.Module
    records: tuple[Record, ...]
    left_out: tuple[tuple[str, str], ...]
    values: Defaults


@torch.no_grad()
def forget(
    loaded: LoadedModel,
    sites: Sites,
    samples: Samples,
    groups: Tensor,
    settings: UnlearnSettings,
    classes: Sequence[int],
    progress: Progress = silent,
) -> Forgotten:
    """A copy of the model without the classes; ``groups`` int64 ``(n,)`` is 0 for retained samples and j for the j-th
    of ``classes`` (-1: not used). The samples have labels.

    Raises ModhifiError where no operator can be edited and for patterns that match none.
    """
    edited = copy.deepcopy(loaded.model)
    run = _Run(loaded, edited, sites, samples, groups, settings, progress, [], [])
    if settings.method == "head-mask":
        run.mask(classes)
    elif settings.method == "erase-writers":
        run.edit_writers()
    else:
        run.edit_readers()
    plain = copy.deepcopy(edited)
    settled = settled_names(sites, [r.module for r in run.records])
    if settings.settle and settled:
        settle_norms(run.runs, settled, groups == 0)
    return Forgotten(edited, plain, tuple(run.records), tuple(run.left_out), run.values)


def settled_names(sites: Sites, edited: Sequence[str]) -> list[str]:
    """The norms of the blocks from the first edited operator on, and all behind the last block."""
    blocks = list(dict.fromkeys([s.block for s in sites.readers] + [block for _, block in sites.norms]))
    order = {s.module: s.block for s in sites.readers}
    first = min((blocks.index(order[name]) for name in edited), default=len(blocks))
    return [name for name, block in sites.norms if blocks.index(block) >= first]


def blend(original: nn.Module, edited: nn.Module, strength: float) -> nn.Module:
    """The model ``strength`` of the way from ``original`` to ``edited``, in every weight and statistic."""
    result = copy.deepcopy(edited)
    start, end = original.state_dict(), edited.state_dict()
    mixed = {k: start[k] + strength * (v - start[k]) if v.is_floating_point() else v for k, v in end.items()}
    result.load_state_dict(mixed)
    return result


def fit_strength(loss: Callable[[float], float], budget: float, steps: int = 6) -> tuple[float, float]:
    """The largest strength in [0, 1] found by bisection whose retain loss is within ``budget``, and that loss.

    Takes the loss to grow with the strength between the points tried.
    """
    full = loss(1.0)
    if full <= budget:
        return 1.0, full
    low, high, best = 0.0, 1.0, loss(0.0)
    for _ in range(steps):
        middle = (low + high) / 2
        value = loss(middle)
        if value <= budget:
            low, best = middle, value
        else:
            high = middle
    return low, best


@dataclass
class _Run:
    loaded: LoadedModel
    model: nn.Module
    sites: Sites
    samples: Samples
    groups: Tensor
    settings: UnlearnSettings
    progress: Progress
    records: list[Record]
    left_out: list[tuple[str, str]]
    runs: Passes = field(init=False)
    values: Defaults = field(init=False)

    def __post_init__(self) -> None:
        self.values = self.settings.filled(self.sites.straight)
        self.passes(())

    def mask(self, classes: Sequence[int]) -> None:
        for name in self.sites.heads:
            head: Any = self.model.get_submodule(name)
            bias = None if head.bias is None else head.bias.detach()
            edit = methods.head_mask(weight_matrix(head)[0].cpu(), None if bias is None else bias.cpu(), classes)
            self.apply(Site(name, name, "bias"), [edit])

    def passes(self, changed: Sequence[str]) -> Passes:
        """Passes from the first of the operators that will change on, or of the norms that will be settled."""
        changed = [*changed, *settled_names(self.sites, changed)]
        self.runs = Passes(self.loaded, self.model, self.samples, self.settings.batch_size, changed)
        return self.runs

    def edit_writers(self) -> None:
        chosen = self.chosen_writers()
        total = self.values.passes * len(chosen)
        runs = self.passes([writer.site.module for writer in chosen])
        for number in range(total):
            writer = chosen[number % len(chosen)]
            weight = weight_matrix(self.model.get_submodule(writer.site.module))[0].cpu()
            try:
                edit = self.writer_edit(runs, writer, weight)
            except ModhifiError as problem:
                self.left_out.append((writer.site.module, str(problem)))
            else:
                self.apply(writer.site, [edit.blend(weight, self.values.strength)])
            self.progress("editing", number + 1, total)
        if not self.records:
            raise ModhifiError(f"no writer could be edited: {self.left_out[0][1]}; try --method erase")

    def writer_edit(self, runs: Passes, writer: Writer, weight: Tensor) -> Edit:
        assert self.samples.labels is not None
        where = (runs, self.groups, self.samples.labels, writer, self.sites.focus)
        if not writer.wide:
            return self.solved(writer, weight, joint_moments(*where))
        spanned = spanned_moments(*where)
        change = self.solved(writer, weight.new_zeros(len(weight), len(spanned.factor)), spanned.joint)
        return replace(change, weight=weight.double() + spanned.lift(change.weight))

    def solved(self, writer: Writer, weight: Tensor, joint: Joint) -> Edit:
        retain, *forgotten = joint.moments
        mean, stress = retain.mean[0], self.settings.class_weight
        return methods.erase_writers(
            weight,
            torch.stack([m.mean[0] for m in forgotten]),
            torch.stack([m.gram[0] for m in forgotten]),
            mean,
            methods.stress_classes(retain.gram[0], mean, joint.class_means, joint.shares, stress),
            scale=writer_scale(self.model, writer),
            forget_weight=self.settings.forget_weight,
            exact=self.settings.exact,
            centred=writer.site.sink is not None,
            damping=self.settings.damping,
        )

    def edit_readers(self) -> None:
        chosen = self.chosen_readers()
        if self.settings.method in ("hifi-zero", "hifi-negate", "contrastive"):
            # These are scored once, on the original, as the paper does.
            names = [s.module for s in chosen]
            moments = reader_moments(self.passes(()), self.groups, names)
            for number, site in enumerate(chosen):
                self.apply(site, self.reader_edits(site, moments[site.module]))
                self.progress("editing", number + 1, len(chosen))
            return
        total = len(chosen) * self.values.passes
        runs = self.passes([site.module for site in chosen])
        for number in range(total):
            site = chosen[number % len(chosen)]
            found = reader_moments(runs, self.groups, [site.module])
            try:
                self.apply(site, self.reader_edits(site, found[site.module]))
            except ModhifiError as problem:
                self.left_out.append((site.module, str(problem)))
            self.progress("editing", number + 1, total)

    def reader_edits(self, site: Site, moments: list[Moments]) -> list[Edit]:
        """One edit for every conv group."""
        layer = self.model.get_submodule(site.module)
        weight, strength, damping = weight_matrix(layer).cpu(), self.values.strength, self.settings.damping
        centred = site.sink is not None
        retain, *forgotten = moments
        edits = []
        for g in range(len(weight)):
            w, mean, gram = weight[g], retain.mean[g], retain.gram[g]
            means = torch.stack([m.mean[g] for m in forgotten])
            grams = torch.stack([m.gram[g] for m in forgotten])
            forget_mean, forget_gram = methods.pooled(means, grams, [1.0] * len(means))
            if self.settings.method == "erase":
                counts = [float(m.n) for m in moments]
                all_mean, all_gram = methods.pooled(
                    torch.cat([mean[None], means]), torch.cat([gram[None], grams]), counts
                )
                edit = methods.erase(w, all_gram, all_mean, means, mean, centred=centred, damping=damping)
                edits.append(edit.blend(w, strength))
            elif self.settings.method == "gls":
                edits.append(
                    methods.gls(
                        w, forget_gram, forget_mean, gram, mean, strength=strength, centred=centred, damping=damping
                    )
                )
            elif self.settings.method == "projection":
                edits.append(
                    methods.projection(w, forget_gram, gram, forget_scale=strength, retain_scale=10 * strength)
                )
            else:
                edits.append(self.masked(layer, w, (forget_mean, forget_gram), (mean, gram), centred, strength))
        return edits

    def masked(
        self,
        layer: Any,
        weight: Tensor,
        forgotten: tuple[Tensor, Tensor],
        retain: tuple[Tensor, Tensor],
        centred: bool,
        share: float,
    ) -> Edit:
        kernel = weight.shape[1] // (layer.in_channels // conv_groups(layer)) if hasattr(layer, "kernel_size") else 1
        blocks = torch.arange(weight.shape[1]).view(-1, kernel)

        def scores(moments: tuple[Tensor, Tensor]) -> Tensor:
            mean, gram = moments
            return singleton_fidelity(weight, gram - torch.outer(mean, mean) if centred else gram, blocks)

        if self.settings.method == "contrastive":
            mean = retain[0] if centred else None
            return methods.contrastive(weight, scores(forgotten), scores(retain), blocks, share, mean=mean)
        rule = methods.hifi_zero if self.settings.method == "hifi-zero" else methods.hifi_negate
        return rule(weight, scores(forgotten), blocks, share)

    def apply(self, site: Site, edits: list[Edit]) -> None:
        layer: Any = self.model.get_submodule(site.module)
        before = weight_matrix(layer)
        after = torch.stack([e.weight for e in edits]).to(before)
        write_weight(layer, after)
        shifts = [e.shift for e in edits if e.shift is not None]
        if shifts and site.sink is not None:
            absorb_mean(self.model, site.module, site.sink, torch.cat(shifts).to(before))
        change = float((after - before).norm() / before.norm().clamp_min(1e-30))
        dampings = [e.damping for e in edits if e.damping is not None]
        self.records.append(Record(site.module, change, max(dampings, default=None)))

    def chosen_writers(self) -> list[Writer]:
        last = self.sites.last(self.values.depth)
        writers = self.sites.writers
        if self.settings.only:
            chosen = [w for w in writers if _matches(w.site.module, self.settings.only)]
        else:
            chosen = [w for w in writers if w.site.block in last]
        if not chosen:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.sites.refused[-2:])
            names = ", ".join(w.site.module for w in writers[-4:])
            detail = f"the last ones are {names}" if names else f"this model has none ({reasons})"
            raise ModhifiError(f"no writer to edit: {detail}; choose others with --only, or --method erase")
        return chosen

    def chosen_readers(self) -> list[Site]:
        """The operators of the last blocks; and for methods that work there also the classifier."""
        readers = self.sites.readers
        if self.settings.only:
            chosen = [s for s in readers if _matches(s.module, self.settings.only)]
        else:
            last = self.sites.last(self.values.depth) or tuple(s.block for s in readers[-4:])
            start = min((i for i, s in enumerate(readers) if s.block in last), default=0)
            masks = self.settings.method in ("hifi-zero", "hifi-negate", "contrastive")
            chosen = [s for s in readers[start:] if not (masks and s.module in self.sites.heads)]
        if not chosen:
            raise ModhifiError(f"no operator matches {', '.join(self.settings.only)}; the last is {readers[-1].module}")
        wide = {s.module: columns_of(self.model.get_submodule(s.module))[1] for s in chosen}
        self.left_out += [(n, f"its {c} input columns are too many") for n, c in wide.items() if c > MOST_COLUMNS]
        fitting = [s for s in chosen if wide[s.module] <= MOST_COLUMNS]
        if not fitting:
            raise ModhifiError(
                f"{self.left_out[0][0]} cannot be edited: {self.left_out[0][1]}; choose others with --only"
            )
        return fitting


def writer_scale(model: nn.Module, writer: Writer) -> Tensor | None:
    """What stands between a writer's output and the stream, float64 ``(out,)``; None for nothing."""
    scale: Tensor | None = None
    if writer.norm is not None:
        norm: Any = model.get_submodule(writer.norm)
        gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        scale = gamma.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    for name in writer.gains:
        gain = model.get_parameter(name).detach().double().flatten()
        scale = gain if scale is None else scale * gain
    return None if scale is None else scale.cpu()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
