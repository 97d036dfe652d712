"""Assemble the package's demo from a trained reference ResNet and CIFAR-10.

    python eval/make_demo.py --model eval/models/demo --data CIFAR10

Copies the model, 50 test images per class as labelled folders, and 500 other images, taken from the training set,
without their labels.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "modhifi" / "demo"


def main(model: Path, data: Path) -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    (TARGET / "model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "training.json"):
        shutil.copyfile(model / name, TARGET / "model" / name)
    chosen = random.Random(0)
    for folder in sorted((data / "test").iterdir()):
        (TARGET / "images" / "test" / folder.name).mkdir(parents=True)
        for path in chosen.sample(sorted(folder.iterdir()), 50):
            shutil.copyfile(path, TARGET / "images" / "test" / folder.name / path.name)
    (TARGET / "images" / "calibration").mkdir()
    everything = sorted(p for folder in (data / "train").iterdir() for p in folder.iterdir())
    for number, path in enumerate(chosen.sample(everything, 500)):
        shutil.copyfile(path, TARGET / "images" / "calibration" / f"{number:03d}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    main(arguments.model, arguments.data)
