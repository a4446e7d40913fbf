"""Neuron selectivity transfer: the channels of two maps are matched as distributions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.maps import at_one_size
from limbeck.losses.reduction import Reduction, full_precision, product, reduce


def neuron_selectivity(
    student: Tensor,
    teacher: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared maximum mean discrepancy of the channels of two maps, with the kernel <a, b>².

    A channel is what one neuron selects: its activations over the positions, of length 1. The larger map is
    pooled to the size of the smaller one first. The order of the channels does not matter.

    Args:
        student: [B, C_s, H, W].
        teacher: [B, C_t, H', W']; detached here.
        weights: >= 0, [B].
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [B] with ``reduction="none"``.

    Raises:
        ShapeError: one is no map, or they are of different samples.

    Source: Huang and Wang 2017 (arXiv 1707.01219), eq. 5, polynomial kernel with d = 2, c = 0.
    """
    maps = at_one_size(full_precision(student), full_precision(teacher.detach()))
    own, other = (F.normalize(x.flatten(2), dim=2) for x in maps)
    items = _kernel(other, other) + _kernel(own, own) - 2 * _kernel(own, other)
    return reduce(items, weights=weights, reduction=reduction)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean over all pairs of channels of the kernel, [B]."""
    return product(a, b.mT).square().mean((1, 2))
