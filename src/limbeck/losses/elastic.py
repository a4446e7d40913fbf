"""Elastic networks: what matters on each axis, which prefix of it a budget keeps, what a router is charged.

Ranks count from 0, the most important. Keeping the first c ranks of every axis makes the networks nested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from limbeck.contracts import Progress
from limbeck.errors import ConfigError, ShapeError, unknown
from limbeck.losses.reduction import full_precision, product

Mode = Literal["soft", "hard"]


def embedding_importance(normed: Tensor) -> Tensor:
    """How active each embedding channel is: Σ |activation| over all tokens.

    Args:
        normed: what a norm gave, [..., D]. Scores of several norms add up.

    Returns:
        [D], each >= 0.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 1.
    """
    return full_precision(normed).abs().flatten(0, -2).sum(0)


def ffn_importance(normed: Tensor, weight: Tensor) -> Tensor:
    """How active each neuron is before its non-linearity: Σ |x · w_i| over all tokens.

    Args:
        normed: what the layer reads, [..., D].
        weight: its first matrix [F, D].

    Returns:
        [F], each >= 0.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 2.
    """
    return product(full_precision(normed), full_precision(weight).mT).abs().flatten(0, -2).sum(0)


def head_importance(queries: Tensor, heads: int) -> Tensor:
    """How active each attention head is: Σ |query projection| over all tokens and the head's features.

    Args:
        queries: [..., heads · size], the heads side by side.
        heads: number of heads.

    Returns:
        [heads], each >= 0.

    Raises:
        ShapeError: features that are no multiple of the heads.

    Source: Nemotron Elastic (arXiv 2511.16664), section 3.1.
    """
    if queries.shape[-1] % heads:
        raise ShapeError(
            f"queries have {queries.shape[-1]} features but must be a multiple of heads = {heads}"
        )
    return embedding_importance(queries).reshape(heads, -1).sum(1)


class MambaImportance(NamedTuple):
    """Scores >= 0 of a Mamba layer's heads H and channels C."""

    scores: Tensor  # [H, C]
    channels: Tensor  # [C]
    heads: Tensor  # [H]


def mamba_importance(normed: Tensor, weight: Tensor, heads: int, top_channels: int) -> MambaImportance:
    """How active the heads and the channels within heads of a Mamba layer are.

    A channel's score is the norm of its column of s = Σ |x · W|; a head's the norm of its row over the best
    ``top_channels`` channels.

    Args:
        normed: what the layer reads, [..., D].
        weight: the projection of its x, [heads · channels, D], the heads side by side.
        heads: H.
        top_channels: in 1 .. C.

    Raises:
        ShapeError: rows of ``weight`` that are no multiple of the heads.
        ConfigError: ``top_channels`` out of range.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 3 and 4.
    Differs: the paper does not say how s is summed over tokens; here by absolute values, as in eq. 1 and 2.
    """
    if len(weight) % heads:
        raise ShapeError(f"weight has {len(weight)} rows but must have a multiple of heads = {heads}")
    scores = ffn_importance(normed, weight).reshape(heads, -1)
    _in_range("top_channels", top_channels, scores.shape[1])
    channels = scores.norm(dim=0)
    best = importance_ranks(channels) < top_channels
    return MambaImportance(scores, channels, (scores * best).norm(dim=1))


def layer_importance(full: Tensor, ablated: Tensor) -> Tensor:
    """How far the logits move when a layer is left out: Σ (full - ablated)² / Σ full².

    Args:
        full: logits [...] of the whole network.
        ablated: logits [N, ...] with layer 0 .. N - 1 left out.

    Returns:
        [N], each >= 0; 0 for a layer that does nothing. A factor of all logits changes nothing.

    Raises:
        ShapeError: other logits than those of the whole network.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 5.
    """
    if ablated.shape[1:] != full.shape:
        raise ShapeError(f"ablated is {list(ablated.shape)} but must be [layers, *{list(full.shape)}]")
    whole = full_precision(full).flatten()
    error = full_precision(ablated).flatten(1) - whole
    return error.square().sum(1) / whole.square().sum()


def importance_ranks(scores: Tensor, groups: int = 1) -> Tensor:
    """The place of each component by falling score, 0 = the most important; equal scores keep their order.

    Args:
        scores: [..., n].
        groups: parts of equal size of the last axis, within which ranks count.

    Returns:
        [..., n] int64, in 0 .. n / groups - 1.

    Raises:
        ConfigError: n is no multiple of the groups.
    """
    count = scores.shape[-1]
    if groups < 1 or count % groups:
        raise ConfigError(f"groups is {groups} but must divide the number of components {count}")
    parts = scores.reshape(*scores.shape[:-1], groups, count // groups)
    order = parts.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1).flatten(-2)


def prefix_masks(ranks: Tensor, counts: Sequence[int]) -> Tensor:
    """For each count c the components of rank below c: nested masks.

    Args:
        ranks: [n] int64 as from ``importance_ranks``.
        counts: one per option, in 1 .. largest rank + 1.

    Returns:
        [options, n] bool.

    Raises:
        ConfigError: a count that nothing or more than everything fits.

    Source: Nemotron Elastic (arXiv 2511.16664), section 3.2.
    """
    for count in counts:
        _in_range("count", count, len(ranks))
    return ranks < torch.tensor(list(counts), device=ranks.device)[:, None]


def mamba_mask(
    head_ranks: Tensor, channel_ranks: Tensor, groups: int, keep_heads: int, keep_channels: int
) -> Tensor:
    """What of a Mamba layer is kept: as many heads in each group, as many channels in each head.

    It is a function alone: this library cuts no Mamba model.

    Args:
        head_ranks: [H] int64, each within its group of H / groups heads that stand side by side.
        channel_ranks: [C] int64.
        groups: number of groups.
        keep_heads: of all groups together, a multiple of ``groups``, in groups .. H.
        keep_channels: in 1 .. C.

    Returns:
        [H, C] bool.

    Raises:
        ConfigError: counts out of range, or heads that do not fit the groups.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 24 and 25.
    """
    if groups < 1 or len(head_ranks) % groups:
        raise ConfigError(f"groups is {groups} but must divide the number of heads {len(head_ranks)}")
    if keep_heads % groups:
        raise ConfigError(f"keep_heads is {keep_heads} but must be a multiple of groups = {groups}")
    _in_range("keep_heads", keep_heads, len(head_ranks))
    _in_range("keep_channels", keep_channels, len(channel_ranks))
    return (head_ranks < keep_heads // groups)[:, None] & (channel_ranks < keep_channels)


def gumbel_softmax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """softmax((logits + noise) / temperature) over the options, one-hot as the temperature goes to 0.

    Args:
        logits: [..., options].
        noise: of the Gumbel distribution, [..., options]; zeros for none.
        temperature: τ > 0.

    Returns:
        Probabilities [..., options].

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 11.
    """
    return ((full_precision(logits) + noise) / temperature).softmax(-1)


def mixed_mask(masks: Tensor, logits: Tensor, probabilities: Tensor, mode: Mode = "soft") -> Tensor:
    """The mask that a network is trained with while the router still chooses.

    Args:
        masks: [options, n] of one axis.
        logits: the router's [..., options].
        probabilities: ``gumbel_softmax`` of them [..., options].
        mode: "soft": the mean of the masks under the probabilities; "hard": the most probable mask times its
            logit, through which alone the gradient then goes.

    Returns:
        [..., n].

    Raises:
        ConfigError: an unknown mode.

    Source: Nemotron Elastic (arXiv 2511.16664), section 3.3: mode 2 is "soft", mode 1 "hard".
    """
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode))
    if mode == "soft":
        return probabilities @ masks.to(probabilities.dtype)
    best = probabilities.argmax(-1, keepdim=True)
    return logits.gather(-1, best) * masks[best.squeeze(-1)]


def expected_cost(probabilities: Tensor, costs: Tensor) -> Tensor:
    """Σ π_i C_i over the options of one axis: [..., options] and [options] to [...]."""
    return (probabilities * costs).sum(-1)


def router_loss(cost: Tensor, target: Tensor | float) -> Tensor:
    """|cost - target|: what a router pays for missing its budget, in the unit of both.

    Args:
        cost: of what the router chooses, with a gradient, for example ``expected_cost``; [...].
        target: the budget, [...] or a number.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 12.
    """
    return (cost - target).abs()


def budget_probabilities(weights: Sequence[float]) -> Tensor:
    """How often each budget is drawn: its weight over the sum, float64. Equal weights make the first stage.

    Raises:
        ConfigError: no weight, a negative or non-finite one, or only zeros.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 18 and 19.
    """
    given = torch.tensor(list(weights), dtype=torch.float64)
    if not (len(given) and torch.isfinite(given).all() and (given >= 0).all() and given.sum() > 0):
        raise ConfigError(f"weights is {list(weights)} but must be finite numbers >= 0, at least one above 0")
    return given / given.sum()


def gumbel_temperature(at: Progress, start: float = 1.0, end: float = 0.05) -> float:
    """Temperature of the Gumbel softmax, from ``start`` at the first step to ``end`` at the last.

    Source: Nemotron Elastic (arXiv 2511.16664), table of hyperparameters.
    Differs: the paper names no curve; this one falls by the same factor at each step.
    """
    return start * float((end / start) ** _done(at))


def router_logit_scale(at: Progress, start: float = 1.0, end: float = 10.0) -> float:
    """Factor of the router's logits, linear from ``start`` at the first step to ``end`` at the last.

    Source: Nemotron Elastic (arXiv 2511.16664), table of hyperparameters.
    """
    return start + (end - start) * _done(at)


def _done(at: Progress) -> float:
    return min(at.step / max(at.steps - 1, 1), 1.0)


def _in_range(what: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ConfigError(f"{what} is {value} but must be from 1 to {most}")
