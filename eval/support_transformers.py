"""Which model types of transformers modhifi can prune, and does the cut model compute what it should?

    python eval/support_transformers.py                   # all; writes eval/results/support_transformers.md and .json
    python eval/support_transformers.py llama bert        # some of them, printed only (written with --keep)
    python eval/support_transformers.py --part 2/6        # the second sixth; the others' rows stay in the results
    python eval/support_transformers.py --missing         # those without a row

No weights are downloaded: every type is built tiny (eval/tiny_configs.py) with random weights. Its prunable groups are
cut to 60 % at once, and the outputs are compared, in float64, with the full-size model whose readers see the same
components only (the mask oracle). The cut model is saved and loaded again, by `modhifi.load` and by transformers alone.
Each type is tried in a process of its own, for two minutes of the processor's time at most.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm.data  # noqa: F401 - what every process needs is imported once
import torch
import transformers
from support import CUT, TOLERANCE, cut, reasons_of
from tiny_configs import build, class_name, model_types
from torch import Tensor, nn

import modhifi.models.from_transformers  # noqa: F401
from modhifi.artifacts.reload_check import FreshProcess, Loader, compare_outputs
from modhifi.artifacts.save import save_artifact
from modhifi.errors import ModhifiError
from modhifi.models.artifact import load_artifact
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import read_manifest
from modhifi.models.stock import can_say
from modhifi.pruning.stages import find_structure
from modhifi.structure.groups import Group, Structure
from modhifi.structure.mixtures import mixtures
from modhifi.structure.outputs import difference
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink

RECORD = Path(__file__).parent / "results" / "support_transformers.json"
SECONDS = 120
KINDS = ("neurons", "heads", "experts", "channels")
YES, NO = "yes", "no"
ATTENTION = re.compile("attention|attn|experts", re.IGNORECASE)


@dataclass
class Row:
    """What was found for one model type: counts of prunable groups by kind, and what became of the cut model."""

    type: str
    model: str
    loads: str = YES
    # Whether a module is called an attention, or holds experts.
    attends: bool = False
    prunable: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    oracle: float | None = None
    load: str = ""
    stock: list[str] = field(default_factory=list)
    remote: str = ""
    generation: str = ""
    failure: str = ""


class InThisProcess(FreshProcess):
    """Loads an artefact again in this process: importing transformers anew would take most of the time."""

    def __init__(self) -> None:
        pass

    def difference(
        self, directory: str | Path, batch: Tensor, expected: Mapping[str, Tensor], loader: Loader | None = None
    ) -> str:
        try:
            loaded = load_artifact(directory) if loader is None else loader(Path(directory))
            with torch.inference_mode():
                torch.manual_seed(0)
                return compare_outputs(loaded.outputs(batch.clone()), expected)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def eager_experts(model: nn.Module) -> nn.Module:
    """The model with experts that run one after the other: torch has no grouped product in float64."""
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return model


def first_half(structure: Structure, wanted: Callable[[Group], bool]) -> Plan:
    """Half of every wanted group, equally many of every part."""
    kept = {}
    for group in structure.prunable:
        if wanted(group):
            parts = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
            members = [(parts == label).nonzero().flatten() for label in parts.unique()]
            kept[group.name] = tuple(
                sorted(int(i) for m in members for i in m[: max(1, len(m) // (2 * group.multiple)) * group.multiple])
            )
    return Plan(kept)


def saved(loaded: LoadedModel, structure: Structure, plan: Plan, folder: Path) -> tuple[nn.Module, Any]:
    small = shrink(copy.deepcopy(loaded.model), structure, plan)
    save_artifact(
        folder,
        small,
        loaded,
        structure,
        plan,
        manifest={"task": "prune"},
        recipe={},
        report={},
        process=InThisProcess(),
    )
    return small, read_manifest(folder).model


@torch.no_grad()
def examine(model_type: str) -> Row:
    """Build one type, trace it, and hold its cut version against the oracle, and against itself loaded again."""
    row = Row(model_type, str(class_name(model_type)))
    try:
        model = build(model_type)
    except Exception as error:
        return Row(model_type, row.model, failure=f"not built: {said(error)}")
    row.attends = any(ATTENTION.search(type(module).__name__) for module in model.modules())
    try:
        loaded = load_model(model)
        structure = find_structure(loaded)
    except ModhifiError as error:
        row.loads = said(error)
        return row
    row.prunable = dict(Counter(g.kind for g in structure.prunable))
    if count := len(mixtures(loaded.model, structure)):
        row.prunable["experts"] = count
    row.refused, row.reasons = len(structure.refused), reasons_of(structure)
    if structure.prunable:
        _try_out(row, loaded, structure)
    return row


@contextmanager
def in_double() -> Iterator[None]:
    """New tensors are float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def outputs(loaded: LoadedModel, model: nn.Module) -> dict[str, Tensor]:
    """What a model returns, with the same draws each time where it draws."""
    torch.manual_seed(0)
    return loaded.outputs(loaded.example, model)


def _try_out(row: Row, loaded: LoadedModel, structure: Structure) -> None:
    torch.manual_seed(0)
    plan = Plan({group.name: cut(group) for group in structure.prunable})
    dense = eager_experts(copy.deepcopy(loaded.model).double())
    # What the model's code makes anew is double as well; some of it knows single precision only.
    with suppress(RuntimeError), in_double():
        masked = outputs(loaded, mask_readers(dense, structure, plan))
        small = outputs(loaded, shrink(dense, structure, plan))
        row.oracle = max(difference(small[name], masked[name]) for name in masked)
    with tempfile.TemporaryDirectory() as folder:
        narrow, entry = saved(loaded, structure, plan, Path(folder) / "unequal")
        problem = InThisProcess().difference(Path(folder) / "unequal", loaded.example, outputs(loaded, narrow))
        row.load, row.remote = problem or YES, YES if entry.remote or entry.stock else str(entry.not_alone or NO)
        kinds = dict.fromkeys(group.kind for group in structure.prunable)
        stock = [kind for kind in kinds if can_say(loaded, structure, kind)]
        uniform = first_half(structure, lambda group: group.kind in stock)
        if stock and saved(loaded, structure, uniform, Path(folder) / "even")[1].stock:
            row.stock = stock
    if generation(loaded.model, loaded) == YES:
        row.generation = generation(narrow, loaded)


def generation(model: Any, loaded: LoadedModel) -> str:
    """Whether greedy generation with a cache gives the tokens that it gives without; empty where nothing is written."""
    if loaded.kind != "text" or not model.can_generate():
        return ""
    options = dict(max_new_tokens=6, do_sample=False, min_new_tokens=6)
    try:
        cached, plain = (model.generate(loaded.example, use_cache=use, **options) for use in (True, False))
    except Exception as error:
        return said(error)
    return YES if torch.equal(cached, plain) else "differs"


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def _child(model_type: str, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    try:
        answer.send(examine(model_type))
    except BaseException as error:  # the table is to show what fails, whatever it is
        traceback.print_exc()
        answer.send(Row(model_type, str(class_name(model_type)), failure=f"crash: {said(error)}"))


def apart(model_type: str) -> Row:
    """:func:`examine` in a process of its own, ended after ``SECONDS`` of the processor's time."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, theirs))
    process.start()
    theirs.close()
    try:
        row: Row = ours.recv()
    except EOFError:
        process.join()
        ended = "time" if process.exitcode == -signal.SIGXCPU else "crash: the process died"
        row = Row(model_type, str(class_name(model_type)), failure=ended)
    process.kill()
    process.join()
    return row


@cache
def every_type() -> list[str]:
    """The model types, which the results keep: to find them, transformers imports each of their files."""
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    known: list[str] = record.get("types", []) if record.get("transformers") == transformers.__version__ else []
    return known or model_types()


def line(row: Row) -> str:
    kinds = [str(row.prunable.get(kind, "")) for kind in KINDS]
    hidden = ("these channels are the model's output",)
    why = "; ".join(f"{reason} ({number})" for reason, number in row.reasons.items() if reason not in hidden)
    oracle = "" if row.oracle is None else f"{row.oracle:.0e}"
    loads = row.failure or row.loads
    cells = [row.type, loads, *kinds, oracle, row.load, ", ".join(row.stock), row.remote, row.generation, why]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def table(rows: list[Row]) -> str:
    built = [r for r in rows if not r.failure.startswith("not built")]
    found = [r for r in built if r.prunable]
    right = [r for r in found if r.oracle is not None and r.oracle <= TOLERANCE]
    stock = [r for r in found if r.stock]
    crashed = [r for r in built if r.failure]
    wide = [r for r in found if {"neurons", "channels"} & r.prunable.keys()]
    attend = [r for r in built if r.attends]
    headed = [r for r in attend if {"heads", "experts"} & r.prunable.keys()]
    return "\n".join(
        [
            "# Supported model types of transformers",
            "",
            f"Written by `python eval/support_transformers.py` (transformers {transformers.__version__}, torch "
            f"{torch.__version__}). {len(rows)} of {len(every_type())} model types were tried, {len(built)} built, "
            f"{len(found)} have prunable groups, {len(right)} of those pass the oracle, {len(stock)} load with stock "
            f"transformers once cut evenly, {len(crashed)} crash or take too long.",
            "",
            f"Feed-forward neurons or channels were found in {len(wide)} of the {len(built)}; heads or experts in "
            f"{len(headed)} of the {len(attend)} that have a module called attention or experts.",
            "",
            "* **loads**: as a module; otherwise what the refusal says.",
            "* **neurons, heads, experts, channels**: the number of groups that can be pruned.",
            f"* **oracle**: the relative difference, float64, between the model cut to {100 * CUT:.0f} % and the "
            f"full-size one masked at its readers; to pass, at most {TOLERANCE:.0e}.",
            "* **`modhifi.load`**, **remote code**: the model cut unevenly, saved and loaded, gives the same outputs.",
            "* **stock**: kinds that can be halved evenly so that plain transformers loads the result.",
            "* **cache**: greedy generation with and without a cache gives the same tokens, where the original's does.",
            "* **refused because**: reasons other than being the model's output, with the number of groups.",
            "",
            "| type | loads | neurons | heads | experts | channels | oracle | `modhifi.load` | stock | remote code "
            "| cache | refused because |",
            "|---|---|---:|---:|---:|---:|---:|---|---|---|---|---|",
            *map(line, (r for r in rows if not r.failure.startswith("not built"))),
            "",
            "Not built tiny by this script: "
            + ", ".join(r.type for r in rows if r.failure.startswith("not built"))
            + ".",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types (default: all)")
    parser.add_argument("--part", default="1/1", help="which part of all, such as 2/6")
    parser.add_argument("--missing", action="store_true", help="only types without a row")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further type after so long")
    parser.add_argument("--keep", action="store_true", help="write the rows of the named types among the results")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    part, parts = map(int, arguments.part.split("/"))
    chosen = arguments.names or every_type()[part - 1 :: parts]
    rows: dict[str, Row] = {}
    if (parts > 1 or arguments.keep or arguments.missing) and RECORD.is_file():
        rows = {entry["type"]: Row(**entry) for entry in json.loads(RECORD.read_text())["rows"]}
    end = time.monotonic() + 60 * arguments.minutes
    for name in chosen:
        if (arguments.missing and name in rows) or time.monotonic() > end:
            continue
        rows[name] = apart(name)
        print(line(rows[name]), file=sys.stderr, flush=True)
        if arguments.keep or not arguments.names:
            write([rows[name] for name in sorted(rows)])
    if arguments.names and not arguments.keep:
        print(table(list(rows.values())))


def write(rows: list[Row]) -> None:
    """Write what is known so far: the whole takes half an hour."""
    record = {"transformers": transformers.__version__, "torch": torch.__version__, "types": every_type()}
    record["rows"] = [asdict(row) for row in rows]
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    RECORD.with_suffix(".md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
