"""The model card: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCardData

from modhifi.artifacts.escape import markdown_code, markdown_text, one_line
from modhifi.artifacts.exports import EXPORTS
from modhifi.artifacts.formatting import asked, figures_table, plain
from modhifi.data.samples import PART
from modhifi.models.manifest import Manifest, ModelEntry

PIPELINES = {"image": "image-classification", "text": "text-generation", "encoder": "feature-extraction"}
HEADS = {
    "SequenceClassification": "text-classification",
    "MaskedLM": "fill-mask",
    "ObjectDetection": "object-detection",
    "SemanticSegmentation": "image-segmentation",
}
# The hub's names of the figures that a run measures with labels or text.
METRICS = ("accuracy", "perplexity")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# The directories that a description of data names, up to the last one.
ON_DISK = re.compile(r":[~/][^,]*/")
TAGS = {"prune": "pruned", "unlearn": "unlearned", "heal": "healed"}


def model_card(name: str, manifest: Manifest, report: Mapping[str, Any], location: str = ".") -> str:
    """The model card of an artefact called ``name``, as Markdown, from its manifest and report.

    ``location`` is the address in its code: the directory, or ``hf:ORG/NAME``.
    """
    base, model, task = manifest.base, manifest.model, manifest.task or "edit"
    stock, remote = (name if (name or "").isidentifier() else None for name in (model.stock, model.remote))
    framework = model.framework
    tags = ["modhifi", TAGS.get(task, "edited")] + [framework] * (framework != "torch")
    named = base.repository and REPOSITORY.fullmatch(base.repository)
    metadata = ModelCardData(
        base_model=base.repository if named else None,
        library_name=framework if stock else "modhifi",
        pipeline_tag=_pipeline(model),
        tags=tags,
        metrics=[metric for metric in METRICS if f"{metric}_after" in (report.get("errors") or {})] or None,
        **_licence(base.licence),
    )
    # Where on somebody's disk the model lay is nobody's business.
    source = markdown_code(Path(base.source).name if os.path.isabs(base.source) else base.source)
    if named:
        source += f", [{base.repository}](https://huggingface.co/{base.repository})"
    if base.revision:
        source += f" at commit {markdown_code(base.revision)}"
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {markdown_text(name)}\n",
        f"{markdown_text(model.info.get('architecture'))}, {_edits(manifest)} with modhifi from {source}, "
        f"{_means(manifest)}.\n",
        f"Licence of the base model: {markdown_text(base.licence or 'not stated')}.\n",
        "## Load\n",
        _snippet(framework, stock, location),
        *_remote(remote, location),
        *_not_alone(model),
        *_preprocessing(model, location),
        *_results(report),
        *_data(manifest),
        "## Intended use and limits\n",
        "What the base model is for, on inputs like those that it was measured on: the figures above speak of no "
        "others. The limits and biases of the base model stay.\n",
    ]
    if task == "unlearn" or manifest.forgotten:
        parts.append("Suppression is not erasure: a class-unlearned model is no proof of data deletion.\n")
    exports = (report.get("settings") or {}).get("export") or []
    files = {f"model{EXPORTS[kind].suffix}": "runs without modhifi" for kind in exports if kind in EXPORTS}
    parts += ["## Files\n", _files(manifest, files)]
    return "\n".join(parts)


def _edits(manifest: Manifest) -> str:
    """What was done to the open model, in order: ``pruned, then healed``."""
    tasks = [*(str(edit.get("task")) for edit in manifest.base.edits_before), manifest.task or "edit"]
    return ", then ".join(TAGS.get(task, "edited") for task in tasks)


def _means(manifest: Manifest) -> str:
    """By what means, which differ in whether the weights were trained."""
    healed = "heal" in {manifest.task, *(edit.get("task") for edit in manifest.base.edits_before)}
    return "by distillation: gradients reached its weights" if healed else "with forward passes only"


def _files(manifest: Manifest, exports: Mapping[str, str]) -> str:
    # no command line can name a module that a program held
    from_python = manifest.base.source.startswith("module:")
    recipe = "the run's settings; the module itself is given from Python" if from_python else "repeats the run"
    known = {"modhifi.json": "what was kept and measured", "recipe.yaml": recipe, "report.html": "shows it"}
    uses = {**dict.fromkeys(manifest.weights.files, "weights"), **known, **exports}
    return "; ".join(f"{markdown_code(name)}: {use}" for name, use in uses.items()) + ".\n"


def _preprocessing(model: ModelEntry, location: str) -> list[str]:
    """The sentence on what the model wants its images, or its text, to be."""
    if model.tokenizer is not None:
        config = cast(dict[str, Any], model.info.get("config") or {})
        sizes = {"a vocabulary of {:,}": "vocab_size", "at most {:,} at once": "max_position_embeddings"}
        known = [text.format(config[key]) for text, key in sizes.items() if isinstance(config.get(key), int)]
        call = f'AutoTokenizer.from_pretrained("{location.removeprefix("hf:")}")'
        tokens = f"tokens of the tokenizer beside the weights (`{call}`)"
        return [f"Text: {'; '.join([tokens, *known])}.\n"]
    given = model.info.get("pretrained_cfg") or {}
    size, mean, std = (given.get(key) for key in ("input_size", "mean", "std"))
    if model.kind != "image" or not (size and mean and std):
        return []
    shape = plain(size).replace(", ", " × ")
    facts = f"{shape}; mean {plain(mean)}; standard deviation {plain(std)}; {given.get('interpolation', 'bicubic')}"
    return [f"Images: {markdown_text(facts)}.\n"]


def _data(manifest: Manifest) -> list[str]:
    """The section on the data: its description, and that its licence is for the reader to look up."""
    named = [("Calibrated on", manifest.calibration), ("measured on", manifest.held_out)]
    parts = [f"{what} {markdown_text(ON_DISK.sub(':', data.description))}" for what, data in named if data.description]
    if not parts:
        return []
    own = PART.sub("", manifest.calibration.description).startswith(("self", "synthetic"))
    licence = "" if own else " Its licence is not recorded here: ask whoever published it."
    return ["## Data\n", f"{'; '.join(parts)}.{licence}\n"]


def _pipeline(model: ModelEntry) -> str | None:
    architecture = str(model.info.get("architecture"))
    if model.kind == "image" and model.info.get("model_args", {}).get("num_classes") == 0:
        return "image-feature-extraction"
    return next((tag for head, tag in HEADS.items() if head in architecture), PIPELINES.get(model.kind))


def _licence(licence: str | None) -> dict[str, Any]:
    """The metadata of a licence: a lower-case identifier of the hub, or ``other`` with a name."""
    if licence is None:
        return {}
    if re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", licence):
        return {"license": licence}
    return {"license": "other", "license_name": one_line(licence)}


def _snippet(framework: str, stock: str | None, location: str) -> str:
    library, call = loading(framework, stock, location)
    dense = "  # dense: the module before the edit" if framework == "torch" else ""
    comment = "  # this directory" if location == "." else ""
    return f"```python\n{library}\n\nmodel = {call}{dense or comment}\n```\n"


def loading(framework: str, stock: str | None, location: str) -> tuple[str, str]:
    """The import and the call that load an artefact: the model's own library where ``stock`` names a loader of it."""
    if stock and framework == "timm":
        argument = f"hf-hub:{location.removeprefix('hf:')}" if location.startswith("hf:") else f"local-dir:{location}"
        return "import timm", f'timm.{stock}("{argument}", pretrained=True)'
    if stock:
        return f"from transformers import {stock}", f'{stock}.from_pretrained("{location.removeprefix("hf:")}")'
    skeleton = ", skeleton=dense" if framework == "torch" else ""
    return "import modhifi", f'modhifi.load("{location}"{skeleton})'


def _remote(auto: str | None, location: str) -> list[str]:
    """The sentence on loading layers of unequal widths with transformers alone and the code in the directory."""
    if not auto:
        return []
    call = f'{auto}.from_pretrained("{location.removeprefix("hf:")}", trust_remote_code=True)'
    return [f"Or with transformers alone and the code that comes with the model: `{call}`.\n"]


def _not_alone(model: ModelEntry) -> list[str]:
    """The sentence on a library that was tried and does not load the model alone."""
    if not model.not_alone:
        return []
    return [f"Not with {model.framework} alone, which was tried: {markdown_text(model.not_alone)}.\n"]


def _results(report: Mapping[str, Any]) -> list[str]:
    if not report.get("before_after"):
        return []
    lines = figures_table(report)
    if report.get("outcome"):
        lines += ["", markdown_text(report["outcome"]["text"])]
    for entry in asked(report.get("verdicts") or []):
        verdict, rung, text = map(markdown_text, (entry["verdict"], entry["name"], entry.get("text") or ""))
        lines += ["", f"**{verdict}** {rung}. {text}".rstrip()]
    return ["## Before and after\n", "\n".join(lines) + "\n"]
