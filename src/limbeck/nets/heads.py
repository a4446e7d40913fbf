"""Classification heads over features [B, D], initialised from a generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.nets.prompts import HeadKind


class NormalisedLinear(nn.Linear):
    """LayerNorm without weights, then a linear map whose weight rows are L2-normalised, plus bias.

    The head of APT in the CDL authors' code: [B, D] to [B, C].
    """

    def forward(self, input: Tensor) -> Tensor:
        normed = F.layer_norm(input, (self.in_features,))
        return F.linear(normed, F.normalize(self.weight, dim=1), self.bias)


def build_head(kind: HeadKind, width: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """A head [B, width] to [B, classes]: torch's default linear start, zeros, or APT's normalised one."""
    head = (NormalisedLinear if kind == "normalised" else nn.Linear)(width, classes, device="meta")
    head = head.to_empty(device="cpu")
    if kind == "zero":
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head
    bound = 1 / math.sqrt(width)  # both ranges of nn.Linear come to this
    nn.init.uniform_(head.weight, -bound, bound, generator=generator)
    nn.init.uniform_(head.bias, -bound, bound, generator=generator)
    return head
