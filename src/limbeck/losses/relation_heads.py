"""Self-attention relations: how the queries, keys or values of a text's tokens relate among themselves.

Relations have no width: networks of any two widths are matched without a projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.errors import ShapeError, unknown
from limbeck.losses.reduction import Reduction, full_precision, product, reduce

Form = Literal["softmax", "raw"]
Projections = tuple[Tensor, Tensor, Tensor]


def head_products(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """Products of all tokens of ``a`` with all of ``b`` within each head, over the root of its size.

    Of queries and keys these are attention scores, of one projection and itself its relations.

    Args:
        a: [B, T, W]; the first ``heads`` · (W // ``heads``) features count, what is left over is dropped.
        b: [B, T, W].
        heads: parts of equal size that the features are cut into, at most W.

    Returns:
        [B, heads, T, T].

    Raises:
        ShapeError: fewer features than heads.
    """
    own, other = _in_heads(a, heads), _in_heads(b, heads)
    return product(own, other.mT) / math.sqrt(own.shape[-1])


def token_relations(
    x: Tensor, heads: int, *, mask: Tensor | None = None, causal: bool = False, form: Form = "softmax"
) -> Tensor:
    """How much each token of a projection is related to each other one, by relation head.

    Args:
        x: queries, keys or values [B, T, W], the heads side by side.
        heads: relation heads, at most W; need not be the attention's.
        mask: True = counts: tokens [B, T], or pairs (query, key) [B, T, T].
        causal: a token is related to itself and to those before it alone.
        form: "softmax" of the products over the tokens that count, or the "raw" products.

    Returns:
        [B, heads, T, T], 0 for pairs that do not count.

    Raises:
        ShapeError: fewer features than heads, or a mask of another shape.
        ConfigError: an unknown form.

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), eq. 4 and 5; "raw" is the authors' code.
    """
    return _related(x, heads, _pairs(x, mask, causal), mask, form)


def relation_losses(
    student: Projections,
    teacher: Projections,
    heads: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    form: Form = "softmax",
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Projections:
    """Mean squared difference of the relations of the queries, of the keys and of the values.

    An item is a token as the one that asks: the mean over relation heads and over the tokens of its text that
    count as answers. Padding therefore changes nothing, neither as a key nor as a query. A rotation of the
    features within a relation head changes nothing either.

    Args:
        student: queries, keys and values [B, T, W_s] of the last layer.
        teacher: the same [B, T, W_t]; detached here.
        heads: relation heads of both, usually the teacher's attention heads.
        mask, causal, form: see ``token_relations``.
        weights: >= 0, [B] or [B, T].
        reduction: see ``reduce``.

    Returns:
        Three values >= 0: scalars, or [B, T] each with ``reduction="none"``. With softmax and T tokens that
        count, each is at most 2 / T.

    Raises:
        ShapeError: texts of another length, fewer features than heads, or a mask of another shape.
        ConfigError: an unknown form.

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), eq. 4 to 6.
    Differs: the authors' code also counts padded queries and matches the raw products, where its additive
    mask cancels and padded keys count too.
    """
    if student[0].shape[:2] != teacher[0].shape[:2]:
        raise ShapeError(
            f"the student's projections are {list(student[0].shape)} but the teacher's "
            f"{list(teacher[0].shape)}: give [batch, tokens, width] of the same texts"
        )
    pairs = _pairs(student[0], mask, causal)
    asks = None if pairs is None else pairs.any(-1)
    answers = student[0].shape[1] if pairs is None else pairs.any(-2).sum(-1).clamp(min=1)[:, None]

    def loss(own: Tensor, other: Tensor) -> Tensor:
        error = _related(own, heads, pairs, mask, form) - _related(other.detach(), heads, pairs, mask, form)
        items = error.square().mean(1).sum(-1) / answers
        return reduce(items, mask=asks, weights=weights, reduction=reduction)

    (q, k, v), (tq, tk, tv) = student, teacher
    return loss(q, tq), loss(k, tk), loss(v, tv)


def relation_loss(
    student: Projections,
    teacher: Projections,
    heads: int,
    *,
    betas: Sequence[float] = (1.0, 1.0, 1.0),
    mask: Tensor | None = None,
    causal: bool = False,
    form: Form = "softmax",
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The three ``relation_losses`` as one, weighed by ``betas`` (queries, keys, values).

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), eq. 6.
    """
    parts = relation_losses(
        student, teacher, heads, mask=mask, causal=causal, form=form, weights=weights, reduction=reduction
    )
    first, second, third = (beta * part for beta, part in zip(betas, parts, strict=True))
    return first + second + third


def _in_heads(x: Tensor, heads: int) -> Tensor:
    """[B, heads, T, size] of projections [B, T, W]."""
    size = x.shape[-1] // heads
    if size < 1:
        raise ShapeError(f"a projection has {x.shape[-1]} features but must have at least heads = {heads}")
    return full_precision(x[..., : heads * size]).reshape(*x.shape[:2], heads, size).transpose(1, 2)


def _related(x: Tensor, heads: int, pairs: Tensor | None, mask: Tensor | None, form: Form) -> Tensor:
    if form not in get_args(Form):
        raise unknown("form", form, get_args(Form))
    if mask is not None and mask.ndim == 2:
        x = x.masked_fill(~mask.bool().unsqueeze(-1), 0.0)  # a NaN in padding would come back in the gradient
    scores = head_products(x, x, heads)
    if pairs is None:
        return scores.softmax(-1) if form == "softmax" else scores
    if form == "softmax":  # the least number, not -inf: a row without any key gives no NaN
        scores = scores.masked_fill(~pairs.unsqueeze(1), torch.finfo(scores.dtype).min).softmax(-1)
    return scores.masked_fill(~pairs.unsqueeze(1), 0.0)


def _pairs(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Which pairs (query, key) count, [B, T, T]; None = all."""
    batch, count = x.shape[:2]
    if mask is not None and mask.shape not in ((batch, count), (batch, count, count)):
        raise ShapeError(
            f"mask is {list(mask.shape)} but must be {[batch, count]} (tokens) or "
            f"{[batch, count, count]} (pairs)"
        )
    if mask is None and not causal:
        return None
    pairs = torch.ones(batch, count, count, dtype=torch.bool, device=x.device)
    if mask is not None:
        counts = mask.bool()
        pairs = counts if mask.ndim == 3 else counts.unsqueeze(1) & counts.unsqueeze(2)
    return pairs.tril() if causal else pairs
