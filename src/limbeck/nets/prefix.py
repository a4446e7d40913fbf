"""Prefix prompts in a timm vision transformer's attention.

A prefix is a pair (keys, values) that every token may attend to. It enters behind the block's own projections
(and behind its query/key norms), so that the frozen weights never see it and the output keeps its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from limbeck.errors import ShapeError

Prefix = tuple[Tensor, Tensor]
PROMPTED = "prompted"  # a block's method that runs it with prompts


@dataclass(frozen=True, slots=True)
class Additive:
    """Vectors added to the key and to the value of one token.

    Attributes:
        position: index of that token in the sequence.
        key: [D].
        value: [D].
    """

    position: int
    key: Tensor
    value: Tensor


def halves(rows: Tensor) -> Prefix:
    """Split prompt rows [..., L, D] into keys (the first half) and values (the rest), each [..., L/2, D]."""
    middle = rows.shape[-2] // 2
    return rows[..., :middle, :], rows[..., middle:, :]


def prefix_attention(
    attn: Attention,
    x: Tensor,
    prefixes: Sequence[Prefix] = (),
    *,
    additive: Additive | None = None,
    mask: Tensor | None = None,
    read: Sequence[int] | None = None,
) -> Tensor:
    """Self-attention over ``x`` whose keys and values are ``[*prefixes, x]``.

    Args:
        attn: timm's attention module; its projections, norms, scale, dropout and gate are used as they are.
        x: tokens [B, N, D], already normed.
        prefixes: groups of (keys, values), each [B, L, D], [1, L, D] or [L, D] (broadcast over the batch).
            Their order does not change the result.
        additive: vectors added to one token's key and value.
        mask: [N, sum of L + N] or broadcastable to [B, heads, N, sum of L + N]; bool (True = may attend) or
            additive.
        read: positions of the n tokens whose outputs are asked for; None = all.

    Returns:
        [B, N, D], or [B, n, D] with ``read``.

    Source: Li and Liang 2021 (prefix tuning) in the form of DualPrompt, eq. 3, and CODA-Prompt, eq. 6.
    """
    asking = tokens_at(x, read)
    q, k, v = _projections(attn, x) if read is None else _projections_apart(attn, x, asking)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if additive is not None:
        k = _add_at(k, additive.position, _heads(additive.key[None], attn, k))
        v = _add_at(v, additive.position, _heads(additive.value[None], attn, v))
    k = torch.cat([*(_heads(key, attn, k) for key, _ in prefixes), k], dim=2)
    v = torch.cat([*(_heads(value, attn, v) for _, value in prefixes), v], dim=2)
    dropout = attn.attn_drop.p if attn.training else 0.0
    if mask is not None:
        mask = tokens_at(mask, read)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=attn.scale)
    return _project(attn, asking, y.transpose(1, 2).flatten(2))


def tokens_at(x: Tensor, read: Sequence[int] | None) -> Tensor:
    """The tokens at positions ``read`` of [..., N, D]; all where that is None."""
    if read is None:
        return x
    return torch.cat([x.narrow(-2, position, 1) for position in read], dim=-2)


def _projections(attn: Attention, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of ``x``, each [B, heads, N, D / heads]."""
    batch, tokens, _ = x.shape
    qkv: Tensor = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _projections_apart(attn: Attention, x: Tensor, asking: Tensor) -> tuple[Tensor, ...]:
    """Queries of the tokens ``asking`` [B, n, D] alone, keys and values of all of ``x``."""
    weight, bias, width = attn.qkv.weight, attn.qkv.bias, attn.num_heads * attn.head_dim
    q = F.linear(asking, weight[:width], None if bias is None else bias[:width])
    kv = F.linear(x, weight[width:], None if bias is None else bias[width:])
    split = (part.view(*part.shape[:2], attn.num_heads, -1) for part in (q, *kv.chunk(2, dim=-1)))
    return tuple(part.transpose(1, 2) for part in split)


def _project(attn: Attention, x: Tensor, y: Tensor) -> Tensor:
    """What timm does behind the attention: inner norm, gate (both absent in older versions), projection."""
    norm, gate = getattr(attn, "norm", None), getattr(attn, "gate", None)
    y = y if norm is None else norm(y)
    y = y if gate is None else y * gate(x).sigmoid()
    projected: Tensor = attn.proj_drop(attn.proj(y))
    return projected


def _heads(rows: Tensor, attn: Attention, like: Tensor) -> Tensor:
    """[L, D], [1, L, D] or [B, L, D] to [B, heads, L, D / heads] in the type of ``like``, without a copy."""
    split = rows.to(like.dtype).view(*rows.shape[:-1], attn.num_heads, attn.head_dim).transpose(-3, -2)
    return split.expand(like.shape[0], -1, -1, -1)


def _add_at(x: Tensor, position: int, value: Tensor) -> Tensor:
    """``x`` [B, heads, N, d] with ``value`` [B, heads, 1, d] added to one token."""
    token = x[:, :, position : position + 1] + value
    return torch.cat((x[:, :, :position], token, x[:, :, position + 1 :]), dim=2)


def promptable(block: nn.Module) -> bool:
    """Whether ``block`` is one whose attention a prefix can enter."""
    return type(block) in (Block, ResPostBlock) and type(getattr(block, "attn", None)) is Attention


def check_promptable(block: nn.Module, path: str) -> None:
    """Raise ``ShapeError`` unless a prefix can enter the attention of ``block``."""
    if not promptable(block):
        attention = type(getattr(block, "attn", None)).__name__
        raise ShapeError(
            f"{path} is a {type(block).__name__} with {attention}, which takes no prefix prompts: "
            "choose a timm VisionTransformer whose blocks are Block or ResPostBlock with plain Attention"
        )


def prompted_block(
    block: Any,
    x: Tensor,
    prefixes: Sequence[Prefix] = (),
    *,
    additive: Additive | None = None,
    mask: Tensor | None = None,
    read: Sequence[int] | None = None,
) -> Tensor:
    """Run one block on ``x`` [B, N, D]; timm's own forward where nothing is added or left out.

    The other arguments are those of ``prefix_attention``; with ``read`` the result is [B, n, D].
    """
    out: Tensor
    if not prefixes and additive is None and mask is None and read is None:
        out = block(x)
    else:
        run = getattr(block, PROMPTED, partial(_prompted, block))
        out = run(x, prefixes=prefixes, additive=additive, mask=mask, read=read)
    return out


def own_method(block: nn.Module) -> None:
    """Let a ``promptable`` block have what ``prompted_block`` runs as its method ``PROMPTED``.

    Who gathers a block's weights before its forward can then do so before that, too; such a block cannot be
    pickled.
    """
    setattr(block, PROMPTED, MethodType(_prompted, block))


def _prompted(
    block: Any,
    x: Tensor,
    prefixes: Sequence[Prefix],
    additive: Additive | None,
    mask: Tensor | None,
    read: Sequence[int] | None,
) -> Tensor:
    def attend(tokens: Tensor) -> Tensor:
        return prefix_attention(block.attn, tokens, prefixes, additive=additive, mask=mask, read=read)

    y: Tensor
    asking = tokens_at(x, read)
    if isinstance(block, ResPostBlock):
        y = asking + block.drop_path1(block.norm1(attend(x)))
        y = y + block.drop_path2(block.norm2(block.mlp(y)))
    else:
        y = asking + block.drop_path1(block.ls1(attend(block.norm1(x))))
        y = y + block.drop_path2(block.ls2(block.mlp(block.norm2(y))))
    return y
