"""Logit standardisation: each row of logits with mean 0 and deviation 1."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.losses.reduction import full_precision

# Added to the deviation, as the official code does.
EPS = 1e-7


def standardise(logits: Tensor) -> Tensor:
    """(x - mean_k x) / (1e-7 + std_k x) over each item's classes; the deviation divides by C - 1.

    What is matched afterwards no longer depends on the scale or the shift of either network's logits. A row
    of equal logits, and a single class, give zeros with gradient zero.

    Args:
        logits: [..., C].

    Returns:
        [..., C] in float32 or better.

    Source: Sun et al., CVPR 2024 (arXiv 2403.01427); deviation and 1e-7 as in the official code.
    """
    x = full_precision(logits)
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(1, x.shape[-1] - 1)
    # The root of 0 has no gradient: rows without deviation are taken out of it.
    spread = variance > 0
    deviation = torch.where(spread, variance, 1.0).sqrt()
    return torch.where(spread, centred / (deviation + EPS), 0.0 * centred)
