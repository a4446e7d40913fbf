"""Small reference networks for small images: a perceptron, a plain CNN, ResNets for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Pixels [B, C, H, W] to logits [B, classes] through hidden layers ``hidden.0``, ``hidden.1``, ...

    Args:
        pixels: C * H * W.
        widths: of the hidden layers; each is a linear map and ReLU.
        classes: number of logits.
    """

    def __init__(self, pixels: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.add_module("flatten", nn.Flatten())
        sizes = [pixels, *widths]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
        self.add_module("hidden", nn.Sequential(*layers))
        self.add_module("head", nn.Linear(sizes[-1], classes))


class ConvNet(nn.Module):
    """Stages ``stages.0``, ``stages.1``, ... of two 3 x 3 convolutions with batch norm and ReLU.

    Every stage after the first halves height and width.

    Args:
        channels: of the images.
        widths: channels of the stages.
        classes: number of logits.
    """

    def __init__(self, channels: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        sizes = [channels, *widths]
        pairs = enumerate(pairwise(sizes))
        self.stages = nn.Sequential(
            *(nn.Sequential(*_conv(a, b, 1 if place == 0 else 2), *_conv(b, b, 1)) for place, (a, b) in pairs)
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        logits: Tensor = self.head(self.pool(self.stages(images)))
        return logits


def _conv(a: int, b: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for images of 32 px, with shortcuts that have no weights (option A).

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110, ...
        widths: channels of ``layer1`` .. ``layer3``; (160, 320, 640) would be that of WRN-*-10.
        channels: of the images.
        classes: number of logits.

    Source: He et al., CVPR 2016, section 4.2.
    """

    def __init__(
        self, depth: int, classes: int, widths: Sequence[int] = (16, 32, 64), channels: int = 3
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        for number, (a, b) in enumerate(pairwise([widths[0], *widths]), 1):
            first = BasicBlock(a, b, 1 if number == 1 else 2)
            self.add_module(
                f"layer{number}", nn.Sequential(first, *(BasicBlock(b, b, 1) for _ in range(blocks - 1)))
            )
        self.stages = len(widths)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        x: Tensor = self.relu(self.bn1(self.conv1(images)))
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        logits: Tensor = self.linear(self.pool(x))
        return logits


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut that skips pixels and pads channels."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(b)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(b)
        self.stride, self.padding = stride, b - a
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """From [B, a, H, W] to [B, b, H / stride, W / stride]."""
        shortcut = x
        if self.stride > 1 or self.padding:
            left = self.padding // 2
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, left, self.padding - left))
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + shortcut)
        return out
