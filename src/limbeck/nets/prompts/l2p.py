"""L2P: a small pool of prompts, chosen by the input itself.

Wang et al., CVPR 2022, arXiv 2112.08654; the prefix form (L2P++) is that of the CODA-Prompt authors. M pool
entries, L rows, k chosen, d query width, D width. Pools may have leading axes (one pool for each block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import ConfigError
from limbeck.nets.prefix import Prefix, halves
from limbeck.nets.prompts import (
    PromptLearner,
    PromptSet,
    TaskPrompts,
    check_blocks,
    check_even,
    check_range,
    uniform,
)


def similarity(query: Tensor, keys: Tensor) -> Tensor:
    """Cosine of each query [..., B, d] and each key [..., M, d], in [-1, 1]: [..., B, M].

    The query gets no gradient; an all-zero query or key has similarity 0.
    """
    query = query.detach().to(keys.dtype)
    return _normalised(query) @ _normalised(keys).mT


def _normalised(x: Tensor) -> Tensor:
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def select(query: Tensor, keys: Tensor, top_k: int, *, batchwise: bool = False) -> tuple[Tensor, Tensor]:
    """The pool entries of each image: the ``top_k`` keys nearest to its query.

    Args:
        query: [B, d].
        keys: [..., M, d].
        top_k: k, at most M.
        batchwise: let the images of the batch vote, and give the k winners to all of them. It lets images of
            one test batch, which are of one task, tell each other their task.

    Returns:
        ids [..., B, k], the nearest (the winner) first, and similarities [..., B, M].

    Source: section 4.2; the vote as in the authors' code: ties to the smaller id, and where fewer than k ids
    got votes the smallest of these repeated.
    """
    near = similarity(query, keys)
    ids = near.detach().topk(top_k, dim=-1).indices
    return (_vote(ids, keys.shape[-2]) if batchwise else ids), near


def _vote(ids: Tensor, pool: int) -> Tensor:
    """The k most frequent of ``ids`` [..., B, k], for every image."""
    votes = F.one_hot(ids, pool).sum((-3, -2))
    order = votes.sort(dim=-1, descending=True, stable=True).indices[..., : ids.shape[-1]]
    smallest = (votes > 0).int().argmax(-1, keepdim=True)
    winners = torch.where(votes.gather(-1, order) > 0, order, smallest)
    return winners.unsqueeze(-2).expand_as(ids)


def reduce_sim(near: Tensor, chosen: Tensor) -> Tensor:
    """Sum over an image's chosen keys of the cosine, mean over images; leading axes add up. In [-k, k].

    Args:
        near: similarities [..., B, M].
        chosen: ids [..., B, k].
    """
    return near.gather(-1, chosen).sum(-1).mean(-1).sum()


def key_loss(near: Tensor, chosen: Tensor, pairs: Literal["own", "all"] = "own") -> Tensor:
    """Distance of queries to chosen keys, ``sum (1 - cos)``, a scalar >= 0.

    Args:
        near: similarities [..., B, M].
        chosen: ids [..., B, k].
        pairs: ``own`` = each image against its own choices, mean over images (as in CDL); ``all`` = every
            image against every image's choices, summed, as published in the CODA-Prompt code: it grows with
            the square of the batch.

    Differs: by the constant k from the ``-reduce_sim`` of the paper, which has the same gradient.
    """
    if pairs == "own":
        tables = chosen[..., 0, 0].numel()
        return tables * chosen.shape[-1] - reduce_sim(near, chosen)
    flat = chosen.flatten(-2).unsqueeze(-2).expand(*near.shape[:-1], -1)
    return (1 - near.gather(-1, flat)).sum()


def gather_prompts(prompts: Tensor, chosen: Tensor) -> Tensor:
    """The chosen prompts of each image: pool [..., M, L, D] and ids [..., B, k] to [..., B, k, L, D].

    By embedding, whose gradient is the same in every run.
    """
    pool, length, width = prompts.shape[-3:]
    tables = torch.arange(prompts[..., 0, 0, 0].numel(), device=chosen.device) * pool
    ids = chosen + tables.view(*prompts.shape[:-3], 1, 1)
    rows = F.embedding(ids, prompts.reshape(-1, length * width))
    return rows.view(*rows.shape[:-1], length, width)


def prefix_prompts(prompts: Tensor, chosen: Tensor) -> Prefix:
    """The chosen prompts as prefixes: the first half of each is keys, the rest values (L2P++).

    Args:
        prompts: [..., M, L, D].
        chosen: ids [..., B, k].

    Returns:
        keys and values, each [..., B, k L/2, D], in the order of ``chosen``.
    """
    keys, values = halves(gather_prompts(prompts, chosen))
    return keys.flatten(-3, -2), values.flatten(-3, -2)


def prepended_prompts(prompts: Tensor, chosen: Tensor) -> Tensor:
    """The chosen prompts as tokens [B, k L, D], in the order of ``chosen``; they carry no position."""
    return gather_prompts(prompts, chosen).flatten(-3, -2)


@dataclass(frozen=True, kw_only=True)
class L2P(PromptLearner):
    """L2P: prompts chosen from a pool by nearest keys, prepended as tokens (or, L2P++, used as prefixes).

    The defaults are the paper's. L2P++ is ``L2P.plus()``.

    Attributes:
        form: ``prepend`` = tokens before block 0, the head reads their mean and starts at zero; ``prefix`` =
            keys and values in ``blocks``, the head reads the class token.
        pool: entries, M.
        length: rows of a prompt, L; in the prefix form half are keys, half are values. 0 = no prompts.
        top_k: entries for an image, k.
        weight: weight of the key loss.
        pairs: which pairs the key loss compares, see ``key_loss``.
        batchwise: one choice for a whole batch, see ``select``; for reproducing only.
        blocks: the prompted blocks of the prefix form; each has its own pool.
        start: range of the uniform start of keys and prompts. The authors' code has [0, 0.01), the PyTorch
            port [-1, 1), L2P++ [0, 1).

    Differs: the paper's selection by frequency is not here, as it is not in the authors' code. The PyTorch
    port gives prompts the class token's position; here they have none, as in the authors' code.
    """

    form: Literal["prepend", "prefix"] = "prepend"
    pool: int = 10
    length: int = 5
    top_k: int = 5
    weight: float = 0.5
    pairs: Literal["own", "all"] = "own"
    batchwise: bool = False
    blocks: tuple[int, ...] = (0,)
    start: tuple[float, float] = (0.0, 0.01)

    def __post_init__(self) -> None:
        check_range(self.start, "start")
        if self.form == "prefix":
            check_even(self.length, "length")
        if self.length < 0:
            raise ConfigError(f"length is {self.length} but must not be negative")
        if not 1 <= self.top_k <= self.pool:
            raise ConfigError(f"top_k is {self.top_k} but must be from 1 to the pool's {self.pool} entries")
        if self.weight < 0:
            raise ConfigError(f"weight is {self.weight} but must not be negative")

    @classmethod
    def plus(cls, **fields: object) -> L2P:
        """L2P++ as in CDL: prefixes in block 0, pool 30, length 20, top 5; ``fields`` override."""
        preset = {"form": "prefix", "pool": 30, "length": 20, "weight": 1.0, "start": (0.0, 1.0)}
        return cls(**{**preset, **fields})  # type: ignore[arg-type]

    def build(
        self, query_dim: int, width: int, depth: int, tasks: int, generator: torch.Generator
    ) -> TaskPrompts:
        """See ``PromptLearner.build``."""
        if not self.length:
            return TaskPrompts(tasks, width)
        if self.form == "prepend":
            return PrependPool(self, query_dim, width, tasks, (), generator)
        check_blocks(self.blocks, depth, "prompts.blocks")
        return PrefixPool(self, query_dim, width, tasks, self.blocks, generator)


class _Pool(TaskPrompts):
    """Keys [..., M, d] and prompts [..., M, L, D]; the prefix form has a leading axis for its blocks."""

    needs_query = True

    def __init__(
        self,
        config: L2P,
        query_dim: int,
        width: int,
        tasks: int,
        blocks: tuple[int, ...],
        generator: torch.Generator,
    ) -> None:
        super().__init__(tasks, width, blocks)
        self.config = config
        lead = (len(blocks),) if blocks else ()
        self.keys = nn.Parameter(uniform((*lead, config.pool, query_dim), config.start, generator))
        shape = (*lead, config.pool, config.length, width)
        self.prompts = nn.Parameter(uniform(shape, config.start, generator))

    def choose(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Chosen ids [..., B, k], and in training the weighted key loss."""
        config = self.config
        chosen, near = select(query, self.keys, config.top_k, batchwise=config.batchwise)
        loss = config.weight * key_loss(near, chosen, config.pairs) if self.training else None
        return chosen, loss


class PrependPool(_Pool):
    """The original form: keys [M, d], prompts [M, L, D]; the head reads the prepended tokens."""

    head = "zero"
    reads_prompts = True

    def forward(self, query: Tensor) -> PromptSet:
        """Tokens [B, k L, D] for ``query`` [B, d]."""
        chosen, loss = self.choose(query)
        return PromptSet(prepend=prepended_prompts(self.prompts, chosen), loss=loss, chosen=chosen)


class PrefixPool(_Pool):
    """L2P++: keys [n, M, d], prompts [n, M, L, D] for the n prompted blocks."""

    def forward(self, query: Tensor) -> PromptSet:
        """Prefixes, each [B, k L/2, D], for ``query`` [B, d]."""
        chosen, loss = self.choose(query)
        keys, values = prefix_prompts(self.prompts, chosen)
        pairs = zip(keys.unbind(0), values.unbind(0), strict=True)
        return PromptSet(prefix=dict(zip(self.blocks, pairs, strict=True)), loss=loss, chosen=chosen)
