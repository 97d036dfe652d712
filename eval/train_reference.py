r"""Train the small reference models that the evaluations use, from scratch, on CIFAR-10.

    python eval/train_reference.py resnet --data cifar10 --out eval/models/resnet
    python eval/train_reference.py resnet --data cifar10 --without 3 --out eval/models/resnet-without-3
    python eval/train_reference.py vgg --data cifar10 --out eval/models/vgg-first
    python eval/train_reference.py vgg --data cifar10 --start eval/models/vgg-first --rate 0.5 --epochs 4 --seed 1 \
        --out eval/models/vgg-second
    python eval/train_reference.py vgg --data cifar10 --start eval/models/vgg-second --rate 0.25 --epochs 2 --seed 2 \
        --out eval/models/vgg

``--data`` is a directory with ``train/<class>/*.png`` and ``test/<class>/*.png``. The result is a directory in
timm's own format (``config.json`` and a half-precision ``model.safetensors``) that
``timm.create_model("local-dir:OUT", pretrained=True)`` loads. A run that was cut off goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import save_for_hf

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

REFERENCES: dict[str, dict[str, Any]] = {
    # The published stem of a timm ResNet divides the resolution by four, so images are enlarged to 64 pixels.
    "resnet": dict(
        arch="resnet18",
        args=dict(layers=(1, 1, 1, 1), stem_type="deep", stem_width=16, channels=(64, 128, 192, 192)),
        sizes=(48,) * 5 + (64,) * 6,
        muon=0.03,
        shift=2,
    ),
    "demo": dict(
        arch="resnet18",
        args=dict(stem_type="deep", stem_width=16, channels=(32, 64, 96, 112)),
        sizes=(64,) * 18,
        lr=0.4,
        hole=8,
        smoothing=0.05,
    ),
    "vgg": dict(arch="vgg11_bn", args=dict(mlp_ratio=1 / 64), sizes=(32,) * 5, muon=0.03, taught=True),
    "swin": dict(
        arch="swin_tiny_patch4_window7_224",
        args=dict(img_size=32, patch_size=2, window_size=4, embed_dim=48, depths=(2, 4), num_heads=(3, 6)),
        sizes=(32,) * 14,
        muon=0.02,
        scaled=False,
        taught=True,
    ),
}


class Muon(torch.optim.Optimizer):
    """Momentum steps made orthogonal (Jordan et al. 2024), for weights with at least two axes.

    In float32: ``torch.optim.Muon`` iterates in bfloat16, which most processors emulate. ``scaled`` keeps every weight
    at the Frobenius norm of an orthogonal matrix, for networks whose norms make them blind to it.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, scaled: bool) -> None:
        super().__init__(params, dict(lr=lr, scaled=scaled, momentum=0.95))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p].setdefault("momentum", torch.zeros_like(p))
                kept.mul_(group["momentum"]).add_(p.grad)
                change = orthogonal((p.grad + group["momentum"] * kept).flatten(1)).view_as(p)
                if group["scaled"]:
                    p.mul_(len(p) ** 0.5 / p.norm())
                p.sub_(change * max(1.0, len(p) / p[0].numel()) ** 0.5, alpha=group["lr"])


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix, with Jordan's coefficients."""
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if tall else x


def load_split(root: Path, split: str) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    """Images as uint8 ``(n, 3, 32, 32)``, labels as int64 ``(n,)``, the class names and the file names."""
    classes = sorted(p.name for p in (root / split).iterdir() if p.is_dir())
    images, labels, files = [], [], []
    for label, name in enumerate(classes):
        for path in sorted((root / split / name).iterdir()):
            images.append(np.asarray(Image.open(path).convert("RGB")))
            labels.append(label)
            files.append(str(path.relative_to(root)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), classes, files


def enlarged(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 ``(n, 3, h, h)`` at another size."""
    if size == images.shape[-1]:
        return images
    parts = [F.interpolate(part.float(), size=(size, size), mode="bicubic") for part in images.split(1000)]
    return torch.cat([part.round_().clamp_(0, 255).byte() for part in parts])


def prepare(images: torch.Tensor) -> torch.Tensor:
    """uint8 ``(n, 3, h, w)`` to normalised float32."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: torch.Tensor, generator: torch.Generator, shift: int, hole: int) -> torch.Tensor:
    """Random shift, mirror and a square cut out; ``shift`` and the side of the ``hole`` in 32nds of the width."""
    n, _, h, w = images.shape
    shift = shift * h // 32
    padded = F.pad(images, (shift,) * 4, mode="reflect")
    out = torch.empty_like(images)
    for i, (dy, dx) in enumerate(torch.randint(0, 2 * shift + 1, (n, 2), generator=generator).tolist()):
        out[i] = padded[i, :, dy : dy + h, dx : dx + w]
    mirrored = torch.rand(n, generator=generator) < 0.5
    out[mirrored] = out[mirrored].flip(-1)
    side = hole * h // 32
    for i, (y, x) in enumerate(torch.randint(0, h, (n, 2), generator=generator).tolist() if side else ()):
        out[i, :, max(0, y - side // 2) : y + side // 2, max(0, x - side // 2) : x + side // 2] = 120
    return out


@torch.no_grad()
def predict(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    return torch.cat([model(prepare(chunk)) for chunk in images.split(500)])


def taught(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Halfway between the labels and what the reference ResNet says: float32 ``(n, classes)``."""
    teacher = timm.create_model(f"local-dir:{Path(__file__).parent / 'models' / 'resnet'}", pretrained=True).eval()
    size = teacher.pretrained_cfg["input_size"][-1]
    said = torch.cat([predict(teacher, enlarged(part, size)) for part in images.split(1000)]).softmax(1)
    return (said + F.one_hot(labels, said.shape[1])) / 2


def optimizers(model: torch.nn.Module, spec: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """SGD, or Muon for the weights between the first and the last layer beside AdamW for the rest."""
    named = list(model.named_parameters())
    if "muon" not in spec:
        decay, rest = [p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim <= 1]
        groups = [dict(params=decay, weight_decay=5e-4), dict(params=rest, weight_decay=0.0)]
        return [torch.optim.SGD(groups, lr=spec["lr"], momentum=0.9, nesterov=True)]
    first = named[0][0]
    maps = [n for n, p in named if p.ndim > 1]
    inner = [n for n in maps if n != first and not n.startswith(("fc.", "head.", "pre_logits.")) and "table" not in n]
    # The head of a VGG sees one position 49 times over, and no norm follows.
    slow = [n for n in maps if n.startswith("pre_logits.")]
    own = dict(named)
    groups = [dict(params=[own[n] for n in own if n not in (*inner, *slow)], lr=5e-3)]
    groups += [dict(params=[own[n] for n in slow], lr=1e-4)] if slow else []
    muon = Muon([own[n] for n in inner], spec["muon"], spec.get("scaled", True))
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)]


def share_of_rate(progress: float, spec: dict[str, Any]) -> float:
    """Of the learning rate at a point in [0, 1] of the schedule: a warm-up, then straight down (Muon) or a cosine."""
    if "muon" in spec:
        return min(1.0, progress / 0.02) * (1 - progress)
    return progress / 0.2 if progress < 0.2 else 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


def train(
    name: str,
    data: Path,
    out: Path,
    without: int | None,
    epochs: int | None,
    seed: int,
    start: Path | None,
    rate: float,
) -> None:
    spec = REFERENCES[name]
    sizes = spec["sizes"][-epochs:] if epochs else spec["sizes"]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels, classes, _ = load_split(data, "train")
    test_images, test_labels, _, _ = load_split(data, "test")
    if without is not None:
        kept = labels != without
        images, labels = images[kept], labels[kept]
    if spec.get("taught") and without is not None:
        raise SystemExit(f"{name} learns from the reference ResNet, which knows class {without}")
    targets = taught(images, labels) if spec.get("taught") else labels

    model = timm.create_model(spec["arch"], num_classes=len(classes), **spec["args"]).to(
        memory_format=torch.channels_last
    )
    if start is not None:
        model.load_state_dict(timm.create_model(f"local-dir:{start}", pretrained=True).state_dict())
    batch, size = 128 if "lr" in spec else 250, sizes[-1]
    steps = len(images) // batch
    used = optimizers(model, spec)
    rates = [[rate * group["lr"] for group in o.param_groups] for o in used]
    test_images = enlarged(test_images, size)
    out.mkdir(parents=True, exist_ok=True)
    left, first, done, spent, shown = out / "unfinished.pt", 0, 0, 0.0, images[:0]
    if left.exists():
        saved = torch.load(left)
        first, done, spent = saved["epoch"], saved["done"], saved["seconds"]
        model.load_state_dict(saved["model"])
        for o, state in zip(used, saved["optimizers"], strict=True):
            o.load_state_dict(state)
        generator.set_state(saved["generator"])
    began = time.time() - spent
    for epoch, width in enumerate(sizes[first:], first):
        if shown.shape[-1] != width or not len(shown):
            shown = enlarged(images, width)
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for index in order[: steps * batch].split(batch):
            for o, own in zip(used, rates, strict=True):
                for group, highest in zip(o.param_groups, own, strict=True):
                    group["lr"] = highest * share_of_rate(done / (steps * len(sizes)), spec)
            x = prepare(augment(shown[index], generator, spec.get("shift", 4), spec.get("hole", 0)))
            loss = F.cross_entropy(model(x), targets[index], label_smoothing=spec.get("smoothing", 0.1))
            model.zero_grad()
            loss.backward()
            if "lr" in spec:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            for o in used:
                o.step()
            done += 1
        sample = slice(None, None, 1 if epoch == len(sizes) - 1 else 5)
        accuracy = (predict(model, test_images[sample]).argmax(1) == test_labels[sample]).float().mean().item()
        seconds = f"{time.time() - began:.0f}s"
        print(f"{name} epoch {epoch + 1}/{len(sizes)} loss {loss.item():.3f} test {accuracy:.4f} {seconds}", flush=True)
        state = dict(epoch=epoch + 1, done=done, seconds=time.time() - began, generator=generator.get_state())
        state |= dict(model=model.state_dict(), optimizers=[o.state_dict() for o in used])
        torch.save(state, left.with_suffix(".tmp"))
        left.with_suffix(".tmp").replace(left)

    # what the architecture's published weights say of themselves is not true of these
    for key in ("tag", "origin_url", "paper_ids", "test_input_size", "test_crop_pct"):
        model.pretrained_cfg.pop(key, None)
    model.pretrained_cfg.update(
        input_size=(3, size, size),
        mean=MEAN,
        std=STD,
        crop_pct=1.0,
        interpolation="bicubic",
        fixed_input_size=True,
        label_names=classes,
        num_classes=len(classes),
        license="apache-2.0",
    )
    model = model.to(memory_format=torch.contiguous_format).half()
    save_for_hf(model, out, model_args=spec["args"], safe_serialization=True)
    correct = predict(model.float().eval(), test_images).argmax(1) == test_labels
    per_class = [correct[test_labels == c].float().mean().item() for c in range(len(classes))]
    record = dict(
        reference=name,
        arch=spec["arch"],
        epochs=len(sizes),
        seed=seed,
        without=without,
        accuracy=correct.float().mean().item(),
        per_class=per_class,
        train_seconds=time.time() - began,
    )
    (out / "training.json").write_text(json.dumps(record, indent=1))
    left.unlink()
    print(json.dumps(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=REFERENCES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--without", type=int, help="leave this class out of the training images")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--start", type=Path, help="go on from the weights of an earlier run")
    parser.add_argument("--rate", type=float, default=1.0, help="share of the learning rate, where a run goes on")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    train(a.name, a.data, a.out, a.without, a.epochs, a.seed, a.start, a.rate)
