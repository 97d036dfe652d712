"""A detector of plain modules in the manner of YOLO: splits, residuals, joins, a neck that goes up and down again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(outputs), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width, 3), Conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Half of the channels pass, the other half goes through bottlenecks, all are joined; split by a kept number."""

    def __init__(self, inputs: int, outputs: int, count: int = 1) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = Conv(inputs, 2 * self.c), Conv((2 + count) * self.c, outputs)
        self.m = nn.ModuleList(Bottleneck(self.c) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Sppf(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width // 2), Conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.pool(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Yolo(nn.Module):
    """Boxes and scores of two scales ``(batch, cells, 4 + classes)``; ``up`` is what the neck goes up with."""

    def __init__(self, up: str = "nearest", classes: int = 3, base: int = 8) -> None:
        super().__init__()
        b = base
        self.stem, self.one = Conv(3, b, 3, 2), nn.Sequential(Conv(b, 2 * b, 3, 2), C2f(2 * b, 2 * b, 2))
        self.two = nn.Sequential(Conv(2 * b, 4 * b, 3, 2), C2f(4 * b, 4 * b), Sppf(4 * b))
        self.up: nn.Module = {
            "nearest": lambda: nn.Upsample(scale_factor=2),
            "transposed": lambda: nn.ConvTranspose2d(4 * b, 4 * b, 2, 2),
            "shuffle": lambda: nn.Sequential(nn.Conv2d(4 * b, 16 * b, 1), nn.PixelShuffle(2)),
        }[up]()
        self.fine, self.down = C2f(6 * b, 2 * b), Conv(2 * b, 2 * b, 3, 2)
        self.coarse = C2f(6 * b, 4 * b)
        self.heads = nn.ModuleList(
            nn.Sequential(Conv(width, width, 3), nn.Conv2d(width, 4 + classes, 1)) for width in (2 * b, 4 * b)
        )

    def forward(self, x: Tensor) -> Any:
        fine = self.one(self.stem(x))
        coarse = self.two(fine)
        fine = self.fine(torch.cat([self.up(coarse), fine], 1))
        coarse = self.coarse(torch.cat([self.down(fine), coarse], 1))
        maps = [head(y).flatten(2) for head, y in zip(self.heads, (fine, coarse), strict=True)]
        return torch.cat(maps, 2).transpose(1, 2)


class Boxes(Yolo):
    """The boxes of the cells of the highest scores, as torchvision's detectors return them."""

    def forward(self, x: Tensor) -> Any:
        rows = super().forward(x)
        found = []
        for item in rows:
            scores, labels = item[:, 4:].sigmoid().max(1)
            best = scores.topk(8).indices
            corner, size = item[best, :2], F.softplus(item[best, 2:4])
            found.append(
                {"boxes": torch.cat([corner, corner + size], 1), "scores": scores[best], "labels": labels[best]}
            )
        return found
