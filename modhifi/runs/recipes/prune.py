"""The recipe of a pruning run, and the parts that recipes share: strict, and enough to repeat the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from modhifi.bounds.verdicts import Tolerances
from modhifi.data.mixture import Mixture, beside_self, separated
from modhifi.disk import home_path, read_json
from modhifi.errors import ModhifiError
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.experts import EXPERT_SELECTORS
from modhifi.pruning.layouts import LAYOUTS
from modhifi.pruning.layouts.base import EXACT, Rounding
from modhifi.pruning.selectors import SELECTORS
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.weightings import WEIGHTINGS
from modhifi.registry import one_of
from modhifi.runs.recipes.budgets import BudgetChoice
from modhifi.runs.recipes.files import Option, Strict, parse_yaml
from modhifi.runs.timing.runtimes import RUNTIMES
from modhifi.structure.plan import Plan

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Kept = Annotated[dict[str, list[int]], Field(min_length=1)]


def _sources(given: str | list[str]) -> str | list[str]:
    """One source as it is, several as a list; raises ModhifiError for shares that cannot be."""
    # Where shares of text leave something, a language model's own text has it.
    Mixture.of(beside_self(given))
    several = separated(given) if isinstance(given, str) else given
    return several[0] if len(several) == 1 else several


# A source of data, or several, each with its share.
Sources = Annotated[str | Annotated[list[str], Field(min_length=1)], AfterValidator(_sources)]

# Keys of every task.
Seed = Annotated[int, Field(ge=0, description="The seed of everything random.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"], Field(description="Where to run; auto takes a GPU if there is one.")
]
Out = Annotated[str | None, Field(description="Directory to write."), Option(panel="Most used", metavar="DIR")]
ReportOut = Annotated[
    str | None,
    Field(description="Where to write the report: a directory, FILE.json or FILE.html."),
    Option(panel="Output", metavar="DIR"),
]
Summary = Annotated[
    str | None,
    Field(description="Also write FILE.md (Markdown) or FILE.xml (JUnit), failed or not."),
    Option(panel="Output", metavar="FILE"),
]


def read_pairs(items: Sequence[str]) -> dict[str, Any]:
    """Parses texts ``KEY=VALUE`` into a mapping, values as YAML; raises ModhifiError for another form."""
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ModhifiError(f"--model-arg takes KEY=VALUE, not {item!r}")
        pairs[key] = parse_yaml(value, f"--model-arg {item}")
    return pairs


def read_plan(path: str) -> dict[str, Any]:
    """Reads the kept components of each group from the JSON of a plan or of a dry run.

    Raises ModhifiError where the file holds no plan.
    """
    try:
        content = read_json(home_path(path))
        return dict(Plan.from_json(content.get("plan", content)).to_json()["kept"])
    except (OSError, ModhifiError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModhifiError(f"{path} holds no plan ({error}); give the JSON of --dry-run --json") from None


class ModelSource(Strict):
    """The source of a model."""

    panel: ClassVar[str] = "Loading"

    name: Annotated[str, Option("MODEL")]
    """timm:NAME, hf:ORG/NAME[@REVISION], demo:resnet, a directory, or a .gguf file."""
    args: Annotated[dict[str, Any], Option("--model-arg", metavar="KEY=VALUE", repeat=True, read=read_pairs)] = {}
    """Argument for timm.create_model; repeat it."""
    pretrained: Annotated[bool, Option("--pretrained/--random-weights")] = True
    """Load weights; without them a model serves for structure and speed only."""
    weights: Annotated[str | None, Option(metavar="FILE")] = None
    """A .safetensors or .pth file for timm:NAME."""
    revision: str | None = None
    """Revision of a hub model."""
    gguf_file: str | None = None
    """A GGUF file of the model; it is dequantised."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    values: bool = False
    """Take several outputs for values, as of a regression, and not for scores of classes."""


class CalibrationData(Strict):
    """The source of calibration samples. None, here and below, is the default of `modhifi.runs.defaults`."""

    panel: ClassVar[str] = "Data"

    source: Annotated[Sources, Option("--data", panel="Most used")] = "synthetic"
    """Calibration data: images:DIR, text:PATH, hf:DATASET[:SPLIT], synthetic[:KIND], or self, text that the language
    model writes, which is what synthetic means there. Several with commas, each with its share: self,text:FILE@0.2."""
    samples: Annotated[Count | None, Option(panel="Most used")] = None
    """Calibration samples of each source; by default 256 images, 128 windows (64 on a CPU)."""
    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens in a window of text; by default 1024 (512 on a CPU)."""

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, content: Any) -> Any:
        """Reads ``data: self`` and ``data: [A, B@0.2]`` as the source."""
        return {"source": content} if isinstance(content, str | list) else content


class DataSource(CalibrationData):
    """The sources of calibration and held-out samples.

    Without ``evaluate`` the held-out ones are other samples of ``source``.
    """

    evaluate: Sources | None = None
    """Held-out data; by default a disjoint part of --data."""
    evaluation_samples: Count | None = None
    """Held-out samples; by default 256 images, 32 windows (16 on a CPU)."""
    only_this_data: bool = False
    """Take text:PATH alone; by default text that a causal model writes itself is mixed with it, one more source."""


class Timing(Strict):
    """What the time or memory of a pass is measured in, for a budget of latency or memory."""

    panel: ClassVar[str] = "Budget"

    runtime: one_of(RUNTIMES) = "eager"  # type: ignore[valid-type]
    """What runs the model while it is timed for --latency."""
    latency_batch: Count = 1
    """Items in the batch that is timed for --latency, or counted for --memory."""
    threads: Count | None = None
    """Threads while it is timed for --latency; by default as many as torch takes."""
    phase: Literal["prefill", "decode"] = "prefill"
    """What of a language model is timed for --latency: a window of tokens, or one token behind a window."""


class Method(Strict):
    """The method: selection of components, allocation over groups, compensation."""

    panel: ClassVar[str] = "Method"

    selector: one_of(SELECTORS) = "obs"  # type: ignore[valid-type]
    """How components are chosen."""
    compensate: one_of(COMPENSATIONS) = "lstsq"  # type: ignore[valid-type]
    """What makes up for the removed ones."""
    experts: Annotated[one_of(EXPERT_SELECTORS), Option("--expert-selector")] = "removal"  # type: ignore[valid-type]
    """How whole experts are chosen, for --experts."""
    allocate: one_of(WEIGHTINGS) = "amplification"  # type: ignore[valid-type]
    """Weight of each group's error: its own energy, or its measured effect."""
    layout: one_of(LAYOUTS) | None = None  # type: ignore[valid-type]
    """Allocate over all groups, or the same share each (default of transformers)."""
    sequential: Literal["auto", "none", "own", "dense"] | None = "auto"
    """Compensate reader after reader on the pruned prefix, towards the layer's own or the dense model's output; auto:
    dense for networks with BatchNorm, none for others."""
    eta: Annotated[float | None, Field(gt=0, le=1), Option(panel="Budget")] = None
    """Instead of a budget: keep HiFi sets of this fidelity."""
    floor: Share = 0.1
    """Least share of a group that stays."""
    round_to: Annotated[Literal["auto"] | Count, Option(metavar="auto|N")] = "auto"
    """Kept widths are multiples of this; auto takes what the device likes, and less where the budget needs it."""
    serve: Literal["int4"] | None = None
    """What the result is made for: weights of four bits, in groups of 128, ask for widths of 128 (--round-to auto)."""
    ridge: Annotated[float, Field(gt=0), Option(panel="Advanced")] = 1e-4
    """Damping, in units of a Gram's mean diagonal."""
    rows_per_column: Annotated[int | None, Field(ge=0), Option(panel="Advanced")] = None
    """Rows a Gram looks at per column; 0 takes all."""
    only: list[str] = []
    """Prune only groups of this name pattern or kind (channels, neurons, heads; on request alone whole blocks and
    sublayers, and ranks of values); repeat it."""
    exclude: list[str] = []
    """Leave groups of this pattern or kind alone; repeat it."""
    coupled: Annotated[bool, Option("--coupled/--inner-only")] = True
    """Also prune channels coupled by residual additions."""
    reestimate_batchnorm: Annotated[bool, Option("--reestimate-bn")] = False
    """Try BatchNorm statistics of the calibration data, and keep them where they agree better with the original."""
    strict: bool = False
    """Let a group that cannot be measured or solved be an error; by default it stays as it is."""

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if self.serve is not None and self.round_to != "auto":
            raise ValueError("serve chooses the widths (multiples of 128 for int4); leave round_to out, or serve")
        return self


class Checks(Strict):
    """Tolerances on how far the outputs may move; see :class:`modhifi.bounds.verdicts.Tolerances`."""

    panel: ClassVar[str] = "Checks"

    max_flip: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Option(panel="Most used")] = None
    """Largest share of inputs whose top-1 may change, such as 0.05."""
    max_error: Annotated[float, Field(ge=0)] | None = None
    """Largest change of the output (Euclidean) that 95 % of inputs must keep to."""
    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None
    """Largest perplexity over the original's, of causal language models."""
    confidence: Share = 0.95
    """Confidence of the statistical bounds."""
    not_a_sample: bool = False
    """The data was not drawn at random: claim nothing beyond it."""
    walked: Annotated[int, Field(ge=0)] | None = None
    """Samples for the certified rungs; by default 16 images, 1 text, none of large models."""

    def tolerances(self) -> Tolerances:
        """The tolerances of the bounds; raises ModhifiError for a number outside its range."""
        return Tolerances(self.max_flip, self.max_error, self.confidence, self.not_a_sample, self.max_perplexity_ratio)


class PruneRecipe(Strict):
    """A pruning run. ``plan`` and ``method.eta`` take the place of a budget."""

    # The keys that set the size: one of them given beside a recipe takes the place of the recipe's own.
    alternatives: ClassVar[tuple[str, ...]] = ("budget", "plan", "method.eta")

    task: Literal["prune"] = "prune"
    model: ModelSource
    data: DataSource = DataSource()
    budget: BudgetChoice = BudgetChoice()
    timing: Timing = Timing()
    method: Method = Method()
    checks: Checks = Checks()
    plan: Annotated[
        Annotated[dict[str, list[int]], Field(min_length=1)] | None,
        Option(panel="Budget", metavar="FILE", read=read_plan),
    ] = None
    """Components kept by group: replay a plan (JSON of --dry-run --json)."""
    seed: Seed = 0
    batch_size: Annotated[int, Field(ge=2)] | None = None
    """Items run at once; by default 32 images or 4 windows."""
    device: Device = "auto"
    offload: bool = False
    """Keep weights in main memory; one block at a time visits the device."""
    out: Out = None
    export: Annotated[list[str], Option(panel="Output")] = []
    """Also write onnx or pt2 into the artefact; repeat it."""
    summary: Summary = None

    def settings(self) -> PruneSettings:
        """The settings of the stages, of a recipe that `modhifi.runs.defaults.complete` has completed."""
        method = self.method
        assert method.layout is not None and self.batch_size is not None
        return PruneSettings(
            selector=method.selector,
            compensate=method.compensate,
            experts=method.experts,
            layout=method.layout,
            weighting=method.allocate,
            sequential=None if method.sequential in ("auto", "none") else method.sequential,
            floor=method.floor,
            rounding=EXACT if method.round_to == "auto" else Rounding(method.round_to),
            ridge=method.ridge,
            rows_per_column=method.rows_per_column or None,
            eta=method.eta,
            only=tuple(method.only or (["heads"] if self.budget.kv_cache is not None else [])),
            exclude=tuple(method.exclude),
            coupled=method.coupled,
            strict=method.strict,
            seed=self.seed,
            batch_size=self.batch_size,
        )
