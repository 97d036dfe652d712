"""The model card: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from modhifi.artifacts.formatting import change, number
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
TAGS = {"prune": "pruned", "unlearn": "unlearned"}


def model_card(name: str, manifest: Manifest, report: Mapping[str, Any], location: str = ".") -> str:
    """The model card of an artefact called ``name``, as Markdown, from its manifest and report.

    ``location`` is the address in its code: the directory, or ``hf:ORG/NAME``.
    """
    base, model, task = manifest.base, manifest.model, manifest.task or "edit"
    stock, framework = model.stock, model.framework
    tags = ["modhifi", TAGS.get(task, "edited")] + [framework] * (framework != "torch")
    metadata = ModelCardData(
        base_model=base.repository,
        library_name=framework if stock else "modhifi",
        pipeline_tag=_pipeline(model),
        tags=tags,
        metrics=[metric for metric in METRICS if f"{metric}_after" in (report.get("errors") or {})] or None,
        **_licence(base.licence),
    )
    source = f"`{base.source}`"
    if base.repository:
        source += f", [{base.repository}](https://huggingface.co/{base.repository})"
    if base.revision:
        source += f" at commit `{base.revision}`"
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {name}\n",
        f"{model.info.get('architecture')}, {TAGS.get(task, 'edited')} with modhifi from {source}, "
        "with forward passes only.\n",
        f"Licence of the base model: {base.licence or 'not stated'}.\n",
        "## Load\n",
        _snippet(framework, stock, location),
        *_remote(model.remote, location),
        *_results(report),
        "## Files\n",
        "`modhifi.json`: what was kept and measured; `recipe.yaml`: repeats the run; `report.html`: shows it.\n",
    ]
    if task == "unlearn":
        parts.append("Suppression is not erasure: a class-unlearned model is no proof of data deletion.\n")
    return "\n".join(parts)


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
    return {"license": "other", "license_name": licence}


def _snippet(framework: str, stock: str | None, location: str) -> str:
    comment = "  # this directory" if location == "." else ""
    if stock and framework == "timm":
        argument = f"hf-hub:{location.removeprefix('hf:')}" if location.startswith("hf:") else f"local-dir:{location}"
        code = f'import timm\n\nmodel = timm.{stock}("{argument}", pretrained=True){comment}'
    elif stock:
        argument = location.removeprefix("hf:")
        code = f'from transformers import {stock}\n\nmodel = {stock}.from_pretrained("{argument}"){comment}'
    elif framework == "torch":
        comment = "  # dense: the module before the edit"
        code = f'import modhifi\n\nmodel = modhifi.load("{location}", skeleton=dense){comment}'
    else:
        code = f'import modhifi\n\nmodel = modhifi.load("{location}"){comment}'
    return f"```python\n{code}\n```\n"


def _remote(auto: str | None, location: str) -> list[str]:
    """The sentence on loading layers of unequal widths with transformers alone and the code in the directory."""
    if not auto:
        return []
    call = f'{auto}.from_pretrained("{location.removeprefix("hf:")}", trust_remote_code=True)'
    return [f"Or with transformers alone and the code that comes with the model: `{call}`.\n"]


def _results(report: Mapping[str, Any]) -> list[str]:
    rows = report.get("before_after") or []
    if not rows:
        return []
    lines = ["| | before | after | change |", "|---|---|---|---|"]
    for row in rows:
        unit = row.get("unit") or ""
        cells = [row["name"], number(row.get("before"), unit), number(row.get("after"), unit), change(row)]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    for verdict in report.get("verdicts") or []:
        lines += ["", f"**{verdict['verdict']}** {verdict['name']}. {verdict.get('text') or ''}".rstrip()]
    return ["## Before and after\n", "\n".join(lines) + "\n"]
