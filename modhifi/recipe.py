"""The recipe: one run as data. Strict, dumpable to YAML, and enough to repeat the run."""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .allocate import Budget
from .errors import ModhifiError
from .pruning import PruneSettings
from .verdicts import Tolerances

Share = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSource(Strict):
    """What to load."""

    name: str
    args: dict[str, Any] = {}
    pretrained: bool = True
    weights: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False


class DataSource(Strict):
    """Calibration and held-out samples; without ``evaluate`` the held-out ones come from ``source`` too, disjoint.

    None, here and below: what `modhifi.defaults` says for the kind of model.
    """

    source: str = "synthetic"
    samples: Annotated[int, Field(ge=1)] | None = None
    evaluate: str | None = None
    evaluation_samples: Annotated[int, Field(ge=1)] | None = None
    window: Annotated[int, Field(ge=2)] | None = None


class BudgetChoice(Strict):
    """Exactly one of: share of components removed, share of parameters kept, share of FLOPs kept."""

    ratio: float | None = None
    params: str | None = None
    flops: str | None = None

    def parse(self) -> Budget:
        return Budget.parse(self.ratio, self.params, self.flops)


class Method(Strict):
    """How components are chosen and what makes up for them."""

    selector: Literal["obs", "naive", "energy", "wanda", "cholesky", "magnitude", "random"] = "obs"
    compensate: Literal["lstsq", "delta", "none"] = "lstsq"
    allocate: Literal["energy", "amplification"] = "amplification"
    layout: Literal["global", "uniform"] | None = None
    sequential: Literal["own", "dense"] | None = None
    eta: Annotated[float, Field(gt=0, le=1)] | None = None
    floor: Share = 0.1
    round_to: Annotated[int, Field(ge=1)] = 1
    ridge: Annotated[float, Field(gt=0)] = 1e-4
    rows_per_column: Annotated[int, Field(ge=0)] | None = None
    only: list[str] = []
    exclude: list[str] = []
    coupled: bool = True
    reestimate_batchnorm: bool = False


class Checks(Strict):
    """Tolerances on how far the outputs may move; see :class:`modhifi.verdicts.Tolerances`.

    ``walked`` samples get the certified rungs; null takes as many as the model's size allows.
    """

    max_flip: Annotated[float, Field(ge=0, le=1)] | None = None
    max_error: Annotated[float, Field(ge=0)] | None = None
    confidence: Share = 0.95
    not_a_sample: bool = False
    walked: Annotated[int, Field(ge=0)] | None = None

    def tolerances(self) -> Tolerances:
        return Tolerances(self.max_flip, self.max_error, self.confidence, self.not_a_sample)


class PruneRecipe(Strict):
    """A pruning run."""

    task: Literal["prune"] = "prune"
    model: ModelSource
    data: DataSource = DataSource()
    budget: BudgetChoice = BudgetChoice()
    method: Method = Method()
    checks: Checks = Checks()
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=2)] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: str | None = None

    def settings(self) -> PruneSettings:
        """What the stages need, of a recipe that `modhifi.defaults.complete` has completed."""
        m = self.method
        assert m.layout is not None and self.batch_size is not None
        return PruneSettings(
            selector=m.selector,
            compensate=m.compensate,
            layout=m.layout,
            weighting=m.allocate,
            sequential=m.sequential,
            floor=m.floor,
            round_to=m.round_to,
            ridge=m.ridge,
            rows_per_column=m.rows_per_column or None,
            eta=m.eta,
            only=tuple(m.only),
            exclude=tuple(m.exclude),
            coupled=m.coupled,
            seed=self.seed,
            batch_size=self.batch_size,
        )


def parse_recipe(data: Any, where: str = "the recipe") -> PruneRecipe:
    """Validate a mapping. Raises ModhifiError that names the key, and the nearest known one for an unknown key."""
    try:
        return PruneRecipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), _keys(PruneRecipe), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "; remove it"
            raise ModhifiError(f"{where}: unknown key '{path}'{hint}") from None
        raise ModhifiError(f"{where}: {path or 'recipe'}: {first['msg'].lower()}, not {first['input']!r}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ModhifiError for a missing file, bad YAML and anything but a mapping."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModhifiError(f"there is no recipe at {path}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ModhifiError(f"{path} is not YAML ({' '.join(str(error).split())}); mend it") from None
    if not isinstance(data, dict):
        raise ModhifiError(f"{path} is no recipe: its top level must be a mapping")
    return data


def load_recipe(path: Path) -> PruneRecipe:
    """Read a YAML recipe. Raises ModhifiError for a missing file, bad YAML and bad content."""
    return parse_recipe(read_yaml(path), str(path))


def apply_overrides(content: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """A copy of a recipe's mapping with each ``a.b=value`` set; values are read as YAML."""
    result = copy.deepcopy(content)
    for change in changes:
        path, found, value = change.partition("=")
        if not found or not path:
            raise ModhifiError(f"--set takes a.b=value, not {change!r}")
        *parents, leaf = path.split(".")
        place = result
        for key in parents:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ModhifiError(f"--set {change}: '{key}' is a value, it holds no '{leaf}'")
        place[leaf] = yaml.safe_load(value)
    return result


def dump_recipe(recipe: PruneRecipe) -> str:
    """YAML that :func:`load_recipe` reads back to an equal recipe; defaults are written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _keys(model: type[BaseModel]) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation)
    return keys
