"""`modhifi env`: what a bug report needs to know about this installation."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import typer

from .common import JsonOption, print_json

PACKAGES = (
    "modhifi",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
)


def env(as_json: JsonOption = False) -> None:
    """Print versions and hardware, ready to paste into a bug report."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in PACKAGES},
        **hardware(),
    }
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:{width}}  {'none' if value is None else value}")


def version(package: str) -> str | None:
    """The installed version of ``package``, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, str | int | float | None]:
    """The device that ``--device auto`` takes, CUDA, usable cores, threads of torch and memory in GiB."""
    import torch

    from modhifi.runs.devices import resolve_device

    device = resolve_device("auto")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": device.type,
        "gpus": ", ".join(names) or None,
        "cuda": torch.version.cuda if names else None,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
    }


def memory_gib() -> float | None:
    """The machine's memory in GiB, None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
