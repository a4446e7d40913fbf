"""What matters in a transformer of the Llama family, and its weights in that order."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import ConfigError, NonFiniteError
from limbeck.losses.elastic import embedding_importance, head_importance, importance_ranks
from limbeck.nets.causal_lm import last_hidden, unembedding
from limbeck.nets.slices import LAYER, axes, check_axes, head_size, whole

TOKENS = 2**14  # of the vocabulary, brought to float64 at a time
Segments = Sequence[Tensor | None] | None


@dataclass(frozen=True)
class Importance:
    """Scores >= 0 of the widths of a transformer of N layers.

    Attributes:
        hidden: of the embedding channels, [D].
        ffn: of each layer's neurons, [N, F].
        heads: of each layer's query heads, [N, H].
    """

    hidden: Tensor
    ffn: Tensor
    heads: Tensor


@torch.no_grad()
def width_importance(
    network: nn.Module,
    batches: Sequence[Tensor],
    counted: Sequence[Tensor] | None = None,
    segments: Segments = None,
) -> Importance:
    """Measure every width on token ids, forward only, in evaluation mode.

    Args:
        network: a model of the Llama family; nothing of it is changed.
        batches: token ids [B, T] each; the paper takes 1024 texts.
        counted: True [B, T] where a token of each batch counts; None = all do.
        segments: which document [B, T] a token of each batch is of; None = a row is one.

    Raises:
        ConfigError: no batch, or a network of another family.
        NonFiniteError: an activation that is no number.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 1 and 2 and section 3.1; the scores of all norms add up.
    Differs: a gated neuron is scored by what it gives, |act(gate) · up|; eq. 2 is of a layer without a gate.
    """
    body, full = decoder(network), whole(network)
    norms = [
        body.norm,
        *(n for layer in body.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    place = next(network.parameters()).device
    hidden = torch.zeros(full.hidden, device=place)
    ffn = torch.zeros(len(full.layers), full.ffn, device=place)
    heads = torch.zeros(len(full.layers), full.heads, device=place)

    here: list[Tensor] = []  # which tokens of the batch at work count

    def seen_by_norm(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        hidden.add_(embedding_importance(output[here[-1]]))

    with ExitStack() as hooks, evaluating(network):
        for norm in norms:
            hooks.callback(norm.register_forward_hook(seen_by_norm).remove)
        for layer, neurons, queries in zip(body.layers, ffn, heads, strict=True):

            def seen_by_down(_module: nn.Module, inputs: tuple[Tensor], scores: Tensor = neurons) -> None:
                scores.add_(embedding_importance(inputs[0][here[-1]]))

            def seen_by_query(
                _module: nn.Module, _inputs: Any, output: Tensor, scores: Tensor = queries
            ) -> None:
                scores.add_(head_importance(output[here[-1]], len(scores)))

            hooks.callback(layer.mlp.down_proj.register_forward_pre_hook(seen_by_down).remove)
            hooks.callback(layer.self_attn.q_proj.register_forward_hook(seen_by_query).remove)
        for ids, mask, documents in _some(batches, counted, segments):
            here.append(mask)
            last_hidden(network, ids, documents)
    for name, scores in {"hidden": hidden, "ffn": ffn, "heads": heads}.items():
        if not torch.isfinite(scores).all():
            raise NonFiniteError(
                f"an activation of the {name} axis is no finite number: check weights and texts"
            )
    return Importance(hidden, ffn, heads)


@torch.no_grad()
def rank_layers(
    network: nn.Module,
    batches: Sequence[Tensor],
    counted: Sequence[Tensor] | None = None,
    segments: Segments = None,
) -> Tensor:
    """The rank of each layer [N] int64, 0 = the most important, by what leaving it out does to the logits.

    The layer whose absence moves the logits least goes first; the others are measured again without it, and
    so on; the order of going, reversed, is the ranking. N (N + 1) / 2 passes over the batches.

    Args:
        network: a causal language model of the Llama family; nothing of it is changed.
        batches: token ids [B, T] each.
        counted: True [B, T] where a token of each batch counts; None = all do.
        segments: which document [B, T] a token of each batch is of; None = a row is one.

    Raises:
        ConfigError: no batch, or a network of another family.
        NonFiniteError: logits that are no numbers.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 5.
    Differs: the paper does not say what later rounds compare with; here the whole network's logits.
    """
    left = list(whole(network).layers)
    gone: list[int] = []
    with evaluating(network):
        while left:
            scores = removal_scores(network, batches, tuple(left), counted, segments)
            if not torch.isfinite(scores).all():
                raise NonFiniteError(
                    "the logits are no finite numbers without some layer: check weights and texts"
                )
            gone.append(left.pop(int(scores.argmin())))
    ranks = torch.empty(len(gone), dtype=torch.int64)
    ranks[torch.tensor(gone)] = torch.arange(len(gone) - 1, -1, -1)
    return ranks


@torch.no_grad()
def removal_scores(
    network: nn.Module,
    batches: Sequence[Tensor],
    left: tuple[int, ...],
    counted: Sequence[Tensor] | None = None,
    segments: Segments = None,
) -> Tensor:
    """``losses.layer_importance`` of each of the layers ``left`` in a network of these alone: [left].

    The logits are never made: those of hidden states h have the squared norm h (WᵀW) hᵀ, for the difference
    of two h as for one.
    """
    head = _gram(network)
    errors, scale = torch.zeros(len(left), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for ids, mask, documents in _some(batches, counted, segments):
        full = last_hidden(network, ids, documents)[mask].double()
        scale += _squared(full, head, bias=1)
        for place, layer in enumerate(left):
            with only_layers(network, tuple(other for other in left if other != layer)):
                short = last_hidden(network, ids, documents)[mask].double()
            errors[place] += _squared(short - full, head, bias=0)
    return errors / scale


def sort_by_importance(network: nn.Module, importance: Importance) -> nn.Module:
    """A copy of the network with every width in order of importance; its outputs are the same.

    Channels are in one order in all layers, neurons in each layer's own, query heads in each layer's own
    within the group that shares a key head. Key heads and layers stay in their places.

    Raises:
        ConfigError: a network of another family.

    Source: Nemotron Elastic (arXiv 2511.16664), section 3.2.
    """
    decoder(network)
    full, size = whole(network), head_size(network)
    channels = _order(importance.hidden)
    orders = [
        {"hidden": channels, "ffn": _order(neurons), "query": _features(queries, full.key_heads, size)}
        for neurons, queries in zip(importance.ffn, importance.heads, strict=True)
    ]
    ordered = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in ordered.named_parameters():
            place = LAYER.fullmatch(name)
            order = orders[0 if place is None else int(place[2])]
            value = parameter.clone()
            for axis, kind in enumerate(axes(name)):
                if kind in order:
                    value = value.index_select(axis, order[kind])
            parameter.copy_(value)
    return ordered


@contextmanager
def only_layers(network: nn.Module, kept: tuple[int, ...]) -> Iterator[None]:
    """Within the context, the network has the layers ``kept`` alone."""
    body = decoder(network)
    layers = body.layers
    body.layers = nn.ModuleList(layers[place] for place in kept)
    try:
        yield
    finally:
        body.layers = layers


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within the context, the network is in evaluation mode; afterwards in the mode it was in."""
    was = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was)


def decoder(network: nn.Module) -> Any:
    """The part of a model of the Llama family that has ``embed_tokens``, ``layers`` and ``norm``.

    Raises:
        ConfigError: a network of another family.
    """
    check_axes(network)
    body: Any = getattr(network, "base_model", network)
    if not all(hasattr(body, part) for part in ("embed_tokens", "layers", "norm")):
        raise ConfigError(f"{type(network).__name__} is no model of the Llama family: take one of it")
    return body


def _gram(network: nn.Module) -> Tensor:
    """WᵀW [D + 1, D + 1] of the unembedding, whose last column is the bias, or 0 where it has none."""
    head: Any = unembedding(network)
    found = torch.zeros((), dtype=torch.float64, device=head.weight.device)
    for start in range(0, len(head.weight), TOKENS):
        part = slice(start, start + TOKENS)
        weight = head.weight.detach()[part].double()
        bias = (
            torch.zeros_like(weight[:, :1]) if head.bias is None else head.bias.detach()[part, None].double()
        )
        columns = torch.cat([weight, bias], 1)
        found = found + columns.mT @ columns
    return found


def _squared(states: Tensor, gram: Tensor, *, bias: int) -> Tensor:
    """The squared norm of the logits of ``states`` [R, D], with or without the bias: a scalar."""
    wide = nn.functional.pad(states, (0, 1), value=bias)
    total: Tensor = torch.linalg.vecdot(wide @ gram, wide).sum().cpu()
    return total


def _order(scores: Tensor) -> Tensor:
    """The components from the most important to the least."""
    return importance_ranks(scores).argsort()


def _features(scores: Tensor, groups: int, size: int) -> Tensor:
    """The query features in the order of their heads, each group's heads in its own place."""
    group = len(scores) // groups
    ranks = importance_ranks(scores, groups)
    start = torch.arange(groups, device=scores.device).repeat_interleave(group) * group
    order = (start + ranks).argsort()
    return (order[:, None] * size + torch.arange(size, device=scores.device)).flatten()


def _some(
    batches: Sequence[Tensor], counted: Sequence[Tensor] | None, segments: Segments
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Each batch with the tokens of it that count, and its documents."""
    if not len(batches):
        raise ConfigError("importance needs at least one batch of token ids: give some texts")
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in batches] if counted is None else counted
    documents = [None] * len(batches) if segments is None else segments
    return zip(batches, masks, documents, strict=True)
