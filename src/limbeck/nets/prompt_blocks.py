"""Small blocks that modulate a stage's output: partial convolutions, prompt and fusion.

B batch, C channels, H x W pixels of a stage's output. A vector [B, C] counts as a map of one pixel; tokens
[B, T, C] as a map of their patches, which stand behind the class token and whatever else is no patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Grid = tuple[int, int]


class PartialConv(nn.Module):
    """A k x k convolution of the first share of the channels; the others pass untouched.

    Args:
        channels: C.
        ratio: one in ``ratio`` channels is convolved, at least 1; with 1 it is an ordinary convolution.
        kernel: k, odd; stride 1 and zero padding keep [B, C, H, W].

    Source: the partial convolution of FasterNet, Chen et al., CVPR 2023 (arXiv 2303.03667), section 3.2.
    """

    def __init__(self, channels: int, ratio: int, kernel: int) -> None:
        super().__init__()
        self.own = max(1, channels // ratio)
        self.conv = nn.Conv2d(self.own, self.own, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv(x[:, : self.own])
        return torch.cat((first, x[:, self.own :]), dim=1)


class PromptBlock(nn.Sequential):
    """P: [B, C, H, W] to [B, C, H, W] through C / r1 channels.

    A 1 x 1 convolution down, for each kernel a partial convolution and a 1 x 1 convolution, and a 1 x 1
    convolution up.

    Args:
        channels: C.
        r1: the inner width is C / r1, at least 1.
        r2: one in r2 inner channels passes the k x k convolutions, at least 1.
        kernels: their sizes, in order.
        norm: ``batch`` = batch norm before each activation.
        activation: ``relu`` or ``none``: behind the convolution down and each inner 1 x 1 convolution.

    Source: Li et al., DFPT-KD (arXiv 2506.18244), prompt block; stride, padding, bias, norm, activation and
    their places are inferred.
    """

    def __init__(
        self,
        channels: int,
        r1: int,
        r2: int,
        kernels: Sequence[int],
        *,
        norm: Literal["none", "batch"] = "none",
        activation: Literal["relu", "none"] = "relu",
    ) -> None:
        inner = max(1, channels // r1)

        def point(a: int) -> list[nn.Module]:
            behind: list[nn.Module] = [nn.BatchNorm2d(inner)] if norm == "batch" else []
            acts: list[nn.Module] = [nn.ReLU()] if activation == "relu" else []
            return [nn.Conv2d(a, inner, 1, bias=False), *behind, *acts]

        layers = point(channels)
        for kernel in kernels:
            layers += [PartialConv(inner, r2, kernel), *point(inner)]
        super().__init__(*layers)
        self.up = nn.Conv2d(inner, channels, 1, bias=False)


class FusionBlock(nn.Module):
    """F: a 1 x 1 convolution of the sum of two maps [B, C, H, W].

    Source: Li et al., DFPT-KD (arXiv 2506.18244), fusion block; its bias is inferred.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """F(x + prompt)."""
        fused: Tensor = self.conv(x + prompt)
        return fused


class StagePrompt(nn.Module):
    """What a stage's output h becomes on the second path: F(h + P(h)).

    Args:
        prompt: P.
        channels: C.
        grid: height and width of the patches where h is tokens; None = h is no tokens.
    """

    def __init__(self, prompt: PromptBlock, channels: int, grid: Grid | None) -> None:
        super().__init__()
        self.prompt, self.fuse, self.grid = prompt, FusionBlock(channels), grid

    def forward(self, h: Tensor) -> Tensor:
        """[B, C, H, W], [B, C] or [B, T, C] to the same shape."""
        if h.ndim == 4:
            return self.on_map(h)
        if h.ndim == 2:
            return self.on_map(h[:, :, None, None]).flatten(1)
        assert self.grid is not None
        other = h.shape[1] - self.grid[0] * self.grid[1]
        patches = h[:, other:].transpose(1, 2).reshape(h.shape[0], h.shape[2], *self.grid)
        return torch.cat((h[:, :other], self.on_map(patches).flatten(2).transpose(1, 2)), dim=1)

    def on_map(self, h: Tensor) -> Tensor:
        """F(h + P(h)) of a map [B, C, H, W]."""
        fused: Tensor = self.fuse(h, self.prompt(h))
        return fused

    @torch.no_grad()
    def start(self, kind: Literal["random", "identity"]) -> None:
        """Draw all weights after Kaiming, from torch's global generator; ``identity`` then takes P out
        (its last convolution is 0) and makes F the identity."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.BatchNorm2d):
                part.reset_parameters()
        if kind == "identity":
            nn.init.zeros_(self.prompt.up.weight)
            nn.init.dirac_(self.fuse.conv.weight)
