"""Contrastive representation distillation: what a memory of all samples is asked, and how it is kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.reduction import Reduction, full_precision, product, reduce

NEAR_ZERO = 1e-7
SAMPLES = 8  # whose rows are gathered at a time


def likelihoods(embedding: Tensor, memory: Tensor, chosen: Tensor, temperature: float = 0.07) -> Tensor:
    """exp(<memory[chosen], embedding> / temperature): how well chosen rows of the memory fit each sample.

    Whichever takes least room: all rows are multiplied and the chosen ones picked afterwards; or a copy of
    the memory is kept for the backward pass; or the chosen rows are.

    Args:
        embedding: [B, D], of length 1.
        memory: [N, D]; it may be written to before the backward pass.
        chosen: rows of the memory for each sample, [B, K + 1] int64.
        temperature: > 0.

    Returns:
        [B, K + 1], above 0.

    Source: Tian, Krishnan, Isola, ICLR 2020 (arXiv 1910.10699), eq. 19.
    """
    memory = memory.detach()
    if _all_rows(embedding, memory, chosen):
        scores = product(embedding, memory.clone().mT).gather(1, chosen)
    elif len(memory) < chosen.numel():
        scores = Scores.apply(embedding, memory.clone(), chosen)  # type: ignore[no-untyped-call]
    else:
        scores = product(F.embedding(chosen, memory), embedding.unsqueeze(2)).squeeze(2)
    return (scores / temperature).exp()


def _all_rows(embedding: Tensor, memory: Tensor, chosen: Tensor) -> bool:
    """Whether the whole product and a copy of the memory are smaller than the gathered rows."""
    (batch, width), rows = embedding.shape, len(memory)
    return rows * (batch + width) < chosen.numel() * width


class Scores(torch.autograd.Function):
    """<memory[chosen], embedding> [B, K + 1], whose rows are gathered for a few samples at a time."""

    @staticmethod
    def forward(ctx: Any, embedding: Tensor, memory: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(memory, chosen)
        count, width = chosen.shape[1], memory.shape[1]
        parts = zip(torch.split(embedding, SAMPLES), torch.split(chosen, SAMPLES), strict=True)
        rows = memory.new_empty(SAMPLES * count, width)
        scores = []
        for own, some in parts:
            part = torch.index_select(memory, 0, some.flatten(), out=rows[: some.numel()])
            scores.append(product(part.view(len(some), count, width), own.unsqueeze(2)).squeeze(2))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        memory, chosen = ctx.saved_tensors
        return F.embedding_bag(chosen, memory, per_sample_weights=grad, mode="sum"), None, None


def noise_contrast(
    fits: Tensor,
    samples: int,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Noise-contrastive estimation: the first of each row is the data, the others are K draws of noise.

    With the noise probability 1 / samples, an item is
    -log(fit_0 / (fit_0 + K / samples)) - Σ_k log((K / samples) / (fit_k + K / samples)).

    Args:
        fits: normalised likelihoods [B, K + 1], >= 0.
        samples: N, out of which the noise is drawn.
        weights: >= 0, [B].
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [B] with ``reduction="none"``.

    Source: Tian, Krishnan, Isola, ICLR 2020 (arXiv 1910.10699), eq. 18, with the 1e-7 of the official code.
    """
    fits = full_precision(fits)
    noise = (fits.shape[1] - 1) / samples
    positive, negatives = fits[:, 0], fits[:, 1:]
    right = (positive / (positive + noise + NEAR_ZERO)).log()
    wrong = (noise / (negatives + noise + NEAR_ZERO)).log().sum(1)
    return reduce(-(right + wrong), weights=weights, reduction=reduction)


@torch.no_grad()
def remembered(rows: Tensor, embedding: Tensor, momentum: float = 0.5) -> Tensor:
    """Rows of the memory [B, D] drawn towards ``embedding`` [B, D], of length 1 again.

    Args:
        momentum: share of what was remembered, in [0, 1].
    """
    return F.normalize(momentum * rows + (1 - momentum) * embedding.to(rows.dtype), dim=1)
