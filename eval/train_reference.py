"""Train the small reference models that the evaluations use, from scratch, on CIFAR-10.

    python eval/train_reference.py resnet --data cifar10 --out eval/models/resnet
    python eval/train_reference.py resnet --data cifar10 --without 3 --out eval/models/resnet-without-3

``--data`` is a directory with ``train/<class>/*.png`` and ``test/<class>/*.png``. The result is a directory in
timm's own format (``config.json`` and a half-precision ``model.safetensors``) that
``timm.create_model("local-dir:OUT", pretrained=True)`` loads.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import save_for_hf

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

REFERENCES = {
    # The published stem of a timm ResNet divides the resolution by four, so images are enlarged to 64 pixels.
    "resnet": dict(
        arch="resnet18",
        size=64,
        epochs=18,
        lr=0.4,
        args=dict(stem_type="deep", stem_width=16, channels=(32, 64, 96, 112)),
    ),
}


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


def prepare(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 ``(n, 3, 32, 32)`` to normalised float32 ``(n, 3, size, size)``."""
    x = images.float() / 255
    if size != x.shape[-1]:
        x = F.interpolate(x, size=(size, size), mode="bicubic").clamp_(0, 1)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random 4-pixel shift, mirror and an 8-pixel cut-out, one draw per image."""
    n, _, h, w = images.shape
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    dy, dx = torch.randint(0, 9, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    cols = torch.arange(w).expand(n, w)
    cols = torch.where(flip[:, None], w - 1 - cols, cols) + dx[:, None]
    rows = torch.arange(h).expand(n, h) + dy[:, None]
    out = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    cy, cx = torch.randint(0, h, (2, n), generator=generator)
    hole = ((torch.arange(h) - cy[:, None]).abs() < 4)[:, :, None] & ((torch.arange(w) - cx[:, None]).abs() < 4)[
        :, None, :
    ]
    return out.masked_fill(hole[:, None], 120)


@torch.no_grad()
def predict(model: torch.nn.Module, images: torch.Tensor, size: int) -> torch.Tensor:
    model.eval()
    return torch.cat([model(prepare(chunk, size)) for chunk in images.split(500)])


def train(name: str, data: Path, out: Path, without: int | None, epochs: int | None, seed: int) -> None:
    spec = REFERENCES[name]
    size, epochs = spec["size"], epochs or spec["epochs"]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels, classes, _ = load_split(data, "train")
    test_images, test_labels, _, _ = load_split(data, "test")
    if without is not None:
        kept = labels != without
        images, labels = images[kept], labels[kept]

    model = timm.create_model(spec["arch"], num_classes=len(classes), **spec["args"]).to(
        memory_format=torch.channels_last
    )
    batch = 128
    steps = epochs * (len(images) // batch)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=decay, weight_decay=spec.get("decay", 5e-4)), dict(params=rest, weight_decay=0.0)]
    if spec.get("optimizer") == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=spec["lr"])
    else:
        optimizer = torch.optim.SGD(groups, lr=spec["lr"], momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, spec["lr"], total_steps=steps, pct_start=0.2)
    start = time.time()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for index in order[: len(order) // batch * batch].split(batch):
            x = prepare(augment(images[index], generator), size)
            loss = F.cross_entropy(model(x), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        sample = slice(None, None, 1 if epoch == epochs - 1 else 5)
        accuracy = (predict(model, test_images[sample], size).argmax(1) == test_labels[sample]).float().mean().item()
        print(
            f"{name} epoch {epoch + 1}/{epochs} loss {loss.item():.3f} test {accuracy:.4f} {time.time() - start:.0f}s",
            flush=True,
        )

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
    correct = predict(model.float().eval(), test_images, size).argmax(1) == test_labels
    per_class = [correct[test_labels == c].float().mean().item() for c in range(len(classes))]
    record = dict(
        reference=name,
        arch=spec["arch"],
        epochs=epochs,
        seed=seed,
        without=without,
        accuracy=correct.float().mean().item(),
        per_class=per_class,
        train_seconds=time.time() - start,
    )
    (out / "training.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=REFERENCES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--without", type=int, help="leave this class out of the training images")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    train(a.name, a.data, a.out, a.without, a.epochs, a.seed)
