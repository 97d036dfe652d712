"""Tiny models for tests: one hand-made module per coupling pattern, and narrow versions of real architectures."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.models.vgg import VGG
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: object) -> nn.Conv2d:
    settings.setdefault("padding", kernel // 2)
    settings.setdefault("bias", False)
    return nn.Conv2d(inputs, outputs, kernel, **settings)  # type: ignore[arg-type]


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **settings: object) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, kernel, **settings), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """A stem of 8 channels, a body, and a pooled linear head of 5 classes that reads ``width`` channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.head = nn.Linear(width, 5)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Forgetful(nn.Module):
    """A layer that copies itself by its arguments, as those of einops do."""

    def __init__(self, start: int = 1) -> None:
        super().__init__()
        self.start = start

    def __getstate__(self) -> dict[str, int]:
        return {"start": self.start}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(self.start)


class Plain(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.conv = conv_bn(8, 6, stride=2)
        self.pool = nn.MaxPool2d(2)

    def body(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))


class Residual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(8, 6), nn.Sequential(conv(6, 8), nn.BatchNorm2d(8))

    def body(self, x: Tensor) -> Tensor:
        x = x + self.second(self.first(x))
        return torch.relu_(x)


class Depthwise(Net):
    def __init__(self, multiplier: int = 1) -> None:
        super().__init__(6)
        self.depthwise = conv_bn(8, 8 * multiplier, groups=8)
        self.point = conv_bn(8 * multiplier, 6, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.point(self.depthwise(x))


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.inner, self.grouped, self.point = conv_bn(8, 12, 1), conv_bn(12, 12, groups=3), conv_bn(12, 6, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.point(self.grouped(self.inner(x)))


class Gate(Net):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand, self.conv = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), conv_bn(8, 8)

    def body(self, x: Tensor) -> Tensor:
        gate = self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True))))
        return self.conv(x * gate.sigmoid())


class Dense(Net):
    """Concatenations as in DenseNet, the input image among them."""

    def __init__(self) -> None:
        super().__init__(5)
        self.one, self.two, self.three = conv_bn(8, 4), conv_bn(12, 4), conv_bn(19, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = torch.cat([x, self.one(x)], 1)
        x = torch.cat([image, x, self.two(x)], 1)
        return self.head(self.three(x).mean((2, 3)))


class Flat(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.hidden, self.head = nn.AdaptiveAvgPool2d(3), nn.Linear(72, 7), nn.Linear(7, 5)

    def flat(self, x: Tensor) -> Tensor:
        return torch.flatten(x, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.flat(self.pool(self.stem(x))))))


class Viewed(Flat):
    """The older way to write it, which asks more of the memory layout."""

    def flat(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class Glu(Net):
    """A gate that is the second half of one convolution's output."""

    def __init__(self) -> None:
        super().__init__(6)
        self.both, self.conv = conv_bn(8, 12), conv_bn(6, 6)

    def body(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, 1)
        return self.conv(value * gate.sigmoid())


class Halves(Net):
    """Two halves that go separate ways and come together again: as many must stay of each."""

    def __init__(self) -> None:
        super().__init__()
        self.both = conv_bn(8, 12)
        self.out = conv(12, 8)

    def body(self, x: Tensor) -> Tensor:
        low, high = self.both(x).chunk(2, 1)
        return self.out(torch.cat([low.tanh(), high], 1))


class LayerScale(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.conv = conv_bn(8, 8)

    def body(self, x: Tensor) -> Tensor:
        return x + self.conv(x) * self.scale


class Prelu(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.act, self.conv = nn.PReLU(8), conv(8, 6, bias=True)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(self.act(x - 0.5))


class Norm(Net):
    """A GroupNorm (or any other norm) between two convolutions, and an ordinary pair behind."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(7)
        self.norm, self.conv, self.last = norm, conv(8, 6), conv(6, 7)

    def body(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(self.norm(x))))


class ResidualLayerNorm(nn.Module):
    """A ConvNeXt-like pair: LayerNorm on the residual width, a free hidden width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.down(F.gelu(self.up(self.norm(x))))).mean(1))


class Shuffle(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv_bn(8, 8)
        self.first, self.second = conv_bn(8, 8, groups=2), conv_bn(8, 8)

    def body(self, x: Tensor) -> Tensor:
        x = self.first(self.inner(x))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.second(x)


class Applied(Net):
    """Any function between two convolutions, with an ordinary pair before them."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__(6)
        self.function = function
        self.inner, self.conv = conv_bn(8, 8), conv_bn(width, 6)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(self.function(self.inner(x)))


class Twice(Net):
    """One convolution called twice, in the manner of a recurrent net."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.norm_one, self.norm_two = conv(8, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm_two(self.shared(torch.relu(self.norm_one(self.shared(x))))))


class Tied(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = (nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(F.relu(self.stem(x)))))))


class Assigned(Net):
    """Writes a part of the channels into a tensor by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv = conv_bn(8, 8), conv_bn(8, 8)

    def body(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        y = torch.zeros_like(x)
        y[:, :4] = x[:, 4:]
        y[:, 4:] = 1.0
        return self.conv(y)


class OwnForward(Net):
    """A convolution used from outside its own forward method."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv = conv_bn(8, 8), conv(8, 8)

    def body(self, x: Tensor) -> Tensor:
        return F.conv2d(2 * self.inner(x), self.conv.weight, padding=1)


class Same(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.conv = Conv2dSame(8, 6, 3, stride=2)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Upsampled(Net):
    """A transposed convolution, then what reads it."""

    def __init__(self, inputs: int = 8, outputs: int = 6, **settings: object) -> None:
        super().__init__(6)
        self.inner = conv_bn(8, inputs)
        self.up = nn.ConvTranspose2d(inputs, outputs, 3, **settings)  # type: ignore[arg-type]
        self.conv = conv(outputs, 6, bias=True)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.up(self.inner(x))))


class Shuffled(Net):
    """The channels of one convolution become pixels, and pixels become channels again."""

    def __init__(self) -> None:
        super().__init__(6)
        self.up, self.conv, self.down = conv(8, 24, bias=True), conv(6, 5, bias=True), conv(20, 6, bias=True)

    def body(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.up(x), 2)
        return self.down(F.pixel_unshuffle(torch.relu(self.conv(torch.relu(x))), 2))


class Sequence(nn.Module):
    """Convolutions over one axis or three, plain and transposed."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        plain, transposed = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv3d, nn.ConvTranspose3d))[axes // 2]
        self.shape = (-1,) if axes == 1 else (4, 6, 6)
        self.stem, self.up, self.conv = plain(3, 8, 3), transposed(8, 6, 3, stride=2, padding=1), plain(6, 7, 2)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.stem(x.unflatten(2, (-1, 1)).reshape(len(x), 3, *self.shape)))))
        return self.head(torch.relu(self.conv(x)).flatten(2).mean(2))


class Stored(Net):
    """Splits at sizes that it keeps: ``sizes`` as a list, or one number for equal parts; the parts go separate ways."""

    def __init__(self, sizes: int | list[int], width: int = 8) -> None:
        super().__init__(width + 4)
        self.sizes = sizes
        first, second = (width // 2, width // 2) if isinstance(sizes, int) else sizes
        self.inner, self.first, self.second = conv_bn(8, width), conv_bn(first, 4), conv_bn(second, second)

    def body(self, x: Tensor) -> Tensor:
        a, b = self.inner(x).split(self.sizes, 1)
        return torch.cat([a, b + self.second(b), self.first(a)], 1)


class Sliced(Net):
    """The first channels, as many as an attribute says, are read by themselves."""

    def __init__(self) -> None:
        super().__init__(9)
        self.count = 3
        self.inner, self.conv = conv_bn(8, 8), conv_bn(3, 4)

    def body(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return torch.cat([self.conv(x[:, : self.count]), x[:, self.count :]], 1)


class Pieces(Net):
    """Two convolutions joined, and taken apart again where they were joined."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = conv_bn(8, 6), conv_bn(8, 4), conv_bn(6, 4)

    def body(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        first, second = torch.relu(torch.cat([one, two], 1)).split([one.shape[1], two.shape[1]], 1)
        return torch.cat([self.three(first), second], 1)


PATTERNS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "depthwise": Depthwise,
    "depthwise x2": lambda: Depthwise(2),
    "grouped": Grouped,
    "gate": Gate,
    "dense": Dense,
    "flat": Flat,
    "viewed": Viewed,
    "glu": Glu,
    "halves": Halves,
    "layer scale": LayerScale,
    "prelu": Prelu,
    "group norm": lambda: Norm(nn.GroupNorm(4, 8)),
    "group norm without scales": lambda: Norm(nn.GroupNorm(4, 8, affine=False)),
    "group norm of all": lambda: Norm(nn.GroupNorm(1, 8)),
    "instance norm without scales": lambda: Norm(nn.InstanceNorm2d(8)),
    "transposed": lambda: Upsampled(stride=2, output_padding=1, padding=1),
    "transposed, dilated": lambda: Upsampled(stride=3, dilation=2, bias=False),
    "transposed, grouped": lambda: Upsampled(12, 6, groups=3, stride=2),
    "transposed, depthwise": lambda: Upsampled(8, 8, groups=8, stride=2),
    "transposed, depthwise x2": lambda: Upsampled(8, 16, groups=8, stride=2),
    "pixel shuffle": Shuffled,
    "one axis": lambda: Sequence(1),
    "three axes": lambda: Sequence(3),
    "stored split": lambda: Stored([3, 5]),
    "stored equal split": lambda: Stored(4),
    "stored list of equal parts": lambda: Stored([4, 4]),
    "stored slice": Sliced,
    "pieces": Pieces,
    "instance norm": lambda: Norm(nn.InstanceNorm2d(8, affine=True)),
    "group norm of single channels": lambda: Norm(nn.GroupNorm(8, 8)),
    "layer norm": ResidualLayerNorm,
    "shuffle": Shuffle,
    "instance norm of no module": lambda: Applied(F.instance_norm),
    "flip": lambda: Applied(lambda x: x.flip(1)),
    "repeat": lambda: Applied(lambda x: x.repeat(1, 2, 1, 1), 16),
    "running sum": lambda: Applied(lambda x: torch.cumsum(x, 1)),
    "roll": lambda: Applied(lambda x: x.roll(1, 1)),
    "reordered": lambda: Applied(lambda x: x[:, [3, 1, 2, 0, 4, 5, 6, 7]]),
    "split": lambda: Applied(lambda x: torch.cat(torch.split(x, [3, 5], 1), 1)),
    "power": lambda: Applied(lambda x: torch.pow(x.abs() + 1, torch.arange(8.0).view(8, 1, 1).to(x) / 8)),
    "twice": Twice,
    "tied": Tied,
    "assigned": Assigned,
    "own forward": OwnForward,
    "same padding": Same,
}

# narrow where the real width would make a test slow; the wiring is always the real one
ARCHITECTURES: dict[str, dict[str, object]] = {
    "resnet18": dict(channels=(8, 12, 16, 20)),
    "resnet50": dict(channels=(8, 12, 16, 20)),
    "resnext50_32x4d": dict(cardinality=4, base_width=16, channels=(8, 16, 24, 32)),
    "wide_resnet50_2": dict(channels=(8, 12, 16, 20)),
    "vgg16_bn": {},
    "densenet121": {},
    "mobilenetv2_100": {},
    "mobilenetv3_small_100": {},
    "efficientnet_b0": {},
    "tf_efficientnet_lite0": {},
    "regnety_008": {},
    "convnext_atto": dict(dims=(8, 12, 16, 20)),
    "mixnet_s": {},
    "ghostnet_100": {},
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Eval mode with BatchNorm statistics, affine parameters and layer scales that make nothing trivially zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        is_norm = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
        if is_norm and module.weight is not None:
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
        for name in ("gamma", "ls1", "ls2"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                getattr(module, name).data.uniform_(0.5, 1.5, generator=generator)
    return model.eval().requires_grad_(False)


def pattern(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A tiny model in float64 and eval mode, and an input batch of 2."""
    torch.manual_seed(seed)
    model = randomise(PATTERNS[name](), seed).double()
    shape = (2, 4, 6) if isinstance(model, (ResidualLayerNorm, Tied)) else (2, 3, 12, 12)
    return model, torch.randn(shape, dtype=torch.float64)


def architecture(name: str, size: int = 40, classes: int = 10, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A narrow version of a timm architecture in float64 and eval mode, and an input batch of 2."""
    torch.manual_seed(seed)
    if name == "vgg16_bn":  # timm gives no handle on its widths
        widths = (8, 8, "M", 12, 12, "M", 16, 16, 16, "M", 20, 20, 20, "M", 20, 20, 20, "M")
        model: nn.Module = VGG(list(widths), norm_layer=nn.BatchNorm2d, mlp_ratio=0.02, num_classes=classes)
    else:
        model = timm.create_model(name, pretrained=False, num_classes=classes, **ARCHITECTURES[name])
    return randomise(model, seed).double(), torch.randn(2, 3, size, size, dtype=torch.float64)
