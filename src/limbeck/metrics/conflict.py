"""Whether two losses pull the same features in one direction."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_conflict(features: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Cosine between the gradients of two losses by the features, in [-1, 1]; the graph is kept.

    Below 0 they are in conflict.

    Args:
        features: what both losses were computed from, any shape; requires a gradient.
        first: a scalar.
        second: a scalar.

    Source: the argument of DHO (arXiv 2505.07675).
    Differs: taken over the flattened batch; the paper's form is not known to us.
    """
    one, other = (
        torch.autograd.grad(loss, features, retain_graph=True)[0].flatten() for loss in (first, second)
    )
    return torch.nn.functional.cosine_similarity(one, other, dim=0)
