"""Graphs of tokens: which image parts are alike, within an image and across the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import ShapeError
from limbeck.losses.hints import hint_mse
from limbeck.losses.reduction import Reduction, full_precision, product, reduce


def tokenise(feature: Tensor, patch: int = 1) -> Tensor:
    """Cut a map into patches: [B, C, H, W] to [B, (H // p)(W // p), C p²].

    Patches stand row by row, and channel by channel within a token; a ragged border is dropped.

    Args:
        feature: [B, C, H, W].
        patch: p >= 1, at most H and W.

    Source: Zhang, Liu, He 2023 (arXiv 2306.12442).
    """
    return F.unfold(feature, patch, stride=patch).mT


def knn_affinity(tokens: Tensor, neighbours: int, sigma: float = 1.0) -> Tensor:
    """A_ij = exp(-|t_i - t_j|² / (2 sigma)) where i is one of the k nearest of j, else 0.

    Each column has min(k, M - 1) entries in (0, 1]; the diagonal is 0. Which are neighbours is not
    differentiated, the distances are.

    Args:
        tokens: [M, D], of length 1 where sigma is to have one meaning.
        neighbours: k >= 1.
        sigma: > 0; squared distances are divided by 2 sigma, not 2 sigma².

    Returns:
        [M, M], in general not symmetric.

    Source: Zhang, Liu, He 2023 (arXiv 2306.12442), the adjacency matrix.
    """
    x = full_precision(tokens)
    squares = x.square().sum(-1)
    distance = (squares[:, None] + squares - 2 * product(x, x.mT)).clamp(min=0)
    own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    nearest = distance.detach().masked_fill(own, torch.inf)
    rows = nearest.topk(min(neighbours, len(x) - 1), dim=0, largest=False).indices
    kept = torch.zeros_like(own).scatter(0, rows, True)
    return torch.where(kept, torch.exp(-distance / (2 * sigma)), 0.0)


def local_graph(
    student: Tensor,
    teacher: Tensor,
    *,
    student_first: bool = True,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL between the rows of two adjacency matrices, each made a distribution by softmax, zeros included.

    Args:
        student: A [M, M].
        teacher: A [M, M]; detached here.
        student_first: KL(student ‖ teacher), as printed; else KL(teacher ‖ student).
        weights: >= 0, [M].
        reduction: see ``reduce``; the paper's equation is the sum over tokens.

    Source: Zhang, Liu, He 2023 (arXiv 2306.12442), the local loss.
    """
    log_p = F.log_softmax(full_precision(student), dim=-1)
    log_q = F.log_softmax(full_precision(teacher.detach()), dim=-1)
    pair = (log_q, log_p) if student_first else (log_p, log_q)
    items = F.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    return reduce(items, weights=weights, reduction=reduction)


def global_graph(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """-log of the softmax share, among all the teacher's tokens, of the student token's own counterpart.

    Similarity is the cosine divided by the temperature. With one token it is 0.

    Args:
        student: projected tokens [M, P].
        teacher: projected tokens [M, P] of the same places. Not detached: its projection learns too.
        temperature: > 0.
        weights: >= 0, [M].
        reduction: see ``reduce``; the paper's equation is the sum over tokens.

    Source: Zhang, Liu, He 2023 (arXiv 2306.12442), the global loss.
    """
    p, q = F.normalize(full_precision(student), dim=-1), F.normalize(full_precision(teacher), dim=-1)
    own = torch.arange(len(p), device=p.device)
    items = F.cross_entropy(product(p, q.mT) / temperature, own, reduction="none")
    return reduce(items, weights=weights, reduction=reduction)


def context(tokens: Tensor) -> Tensor:
    """softmax(F Fᵀ / sqrt(D)) over the last axis: how alike the tokens [B, n, D] of an image are, [B, n, n].

    Source: Zhang, Liu, He 2023 (arXiv 2306.12442), the contextual loss.
    """
    x = full_precision(tokens)
    return F.softmax(product(x, x.mT) / x.shape[-1] ** 0.5, dim=-1)


def contextual(
    student: Tensor,
    teacher: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean squared difference of the two contexts (see ``context``) over images and pairs of tokens.

    Args:
        student: tokens [B, n, D].
        teacher: tokens [B, n, D'] of the same places; the widths may differ. Detached here.
        weights: >= 0, [B].
        reduction: see ``reduce``.

    Raises:
        ShapeError: the two have different numbers of tokens.

    Source: Zhang, Liu, He 2023 (arXiv 2306.12442), the contextual loss.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ShapeError(
            f"the student has {list(student.shape[:2])} images and tokens but the teacher "
            f"{list(teacher.shape[:2])}: cut both maps into the same patches"
        )
    return hint_mse(context(student), context(teacher.detach()), weights=weights, reduction=reduction)
