"""CODA-Prompt: a prompt is a weighted sum of components, attended to by the query.

Smith et al., CVPR 2023, arXiv 2211.13218. M components, g = M / tasks of them for each task, d query width,
L rows, D width. Every bank may have leading axes (one bank for each prompted block); they broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.prefix import halves
from limbeck.nets.prompts import PromptLearner, PromptSet, TaskPrompts, check_blocks, check_even

EPS = 1e-12  # of the published normalisation


def attend(query: Tensor, keys: Tensor, attention: Tensor) -> Tensor:
    """Weights of the components: cos(query * attention_m, key_m), in [-1, 1] (eq. 4 and 5).

    Args:
        query: [..., B, d].
        keys: [..., M, d].
        attention: [..., M, d].

    Returns:
        [..., B, M].

    The products over d are matrix products, so that no [B, M, d] is ever made.
    """
    dots = query @ (attention * F.normalize(keys, dim=-1, eps=EPS)).mT
    squares = query.square() @ attention.square().mT
    return dots / squares.clamp_min(EPS**2).sqrt()


def ortho(rows: Tensor) -> Tensor:
    """Mean squared distance of the Gram matrix of ``rows`` [..., r, d] from the identity, a scalar (eq. 8).

    Rows are used as they are, not normalised; banks on leading axes add up. 0 iff the rows are orthonormal.
    """
    identity = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return (rows @ rows.mT - identity).square().mean((-2, -1)).sum()


def coda_prompt(
    query: Tensor,
    keys: Tensor,
    attention: Tensor,
    prompts: Tensor,
    *,
    task: int,
    group: int,
    ortho_weight: float = 0.0,
    train: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prefix keys and values for each query, and the orthogonality term.

    In training the components of earlier tasks are used but frozen; those of later tasks are never read.

    Args:
        query: [..., B, d]; gets no gradient.
        keys: [..., M, d].
        attention: [..., M, d].
        prompts: [..., M, L, D].
        task: the current task, from 0.
        group: components of each task, g.
        ortho_weight: weight of the orthogonality term.
        train: whether the current task is being learned.

    Returns:
        keys [..., B, L/2, D], values [..., B, L - L/2, D] and the weighted term, None where there is none.

    Source: section 4, eq. 3 to 8; freezing and term as in the authors' code.
    """
    start, stop = task * group, (task + 1) * group
    keys = _live(keys, -2, start, stop, train)
    attention = _live(attention, -2, start, stop, train)
    prompts = _live(prompts, -3, start, stop, train)
    weights = attend(_full(query.detach()), keys, attention)
    prompt_keys, prompt_values = halves(torch.einsum("...bm,...mld->...bld", weights, prompts))
    if not train or ortho_weight == 0:
        return prompt_keys, prompt_values, None
    term = ortho(keys) + ortho(attention) + ortho(prompts.flatten(-2))
    return prompt_keys, prompt_values, ortho_weight * term


def _live(bank: Tensor, axis: int, start: int, stop: int, train: bool) -> Tensor:
    """The components up to ``stop``, in float32 or better; those before ``start`` detached in training."""
    bank = _full(bank)
    if not train or start == 0:
        return bank.narrow(axis, 0, stop)
    return torch.cat((bank.narrow(axis, 0, start).detach(), bank.narrow(axis, start, stop - start)), axis)


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gram_schmidt_expand(pool: Tensor, draws: Tensor, task: int) -> Tensor:
    """The bank at the start of ``task``: its rows orthonormal and orthogonal to the earlier ones.

    Args:
        pool: [M, ...]; rows of earlier tasks are copied, rows of later tasks become 0.
        draws: standard normal draws [g, number of elements of a row].
        task: the task that starts, from 0.

    Returns:
        A bank like ``pool``. Each new row is one draw less its projections on all rows before it (new ones
        not yet normalised); the new rows are normalised at the end.

    Differs: a null row is left out of the projection; the authors' code draws again, for ever, since the null
    row stays.
    """
    rows = pool.detach().flatten(1).double()
    start, stop = task * len(draws), (task + 1) * len(draws)
    out = torch.zeros_like(rows)
    out[:start] = rows[:start]
    for k, draw in enumerate(draws.to(rows), start=start):
        before = out[:k]
        squares = before.square().sum(1)
        shares = torch.where(squares < 1e-8, 0.0, (before @ draw) / squares)
        out[k] = draw - shares @ before
    out[start:stop] = F.normalize(out[start:stop], dim=1)
    return out.to(pool.dtype).view_as(pool)


@dataclass(frozen=True, kw_only=True)
class CODA(PromptLearner):
    """CODA-Prompt: input-weighted prompt components, a fresh orthogonal group for each task.

    Attributes:
        pool: components in all, M; a multiple of the number of tasks.
        length: rows of a prompt, L: the first half are keys, the second half values. 0 = no prompts.
        ortho_weight: weight of the orthogonality term; the authors' code says that 0 does.
        blocks: the prompted blocks, from 0.

    Differs: the paper makes all components orthogonal at the start and adds the term; here, as in the
    authors' code, each group is made orthogonal when its task starts. A pool that the tasks do not divide is
    refused; the authors' code leaves the remainder unused.
    """

    pool: int = 100
    length: int = 8
    ortho_weight: float = 0.0
    blocks: tuple[int, ...] = (0, 1, 2, 3, 4)

    def __post_init__(self) -> None:
        check_even(self.length, "length")
        if self.ortho_weight < 0:
            raise ConfigError(f"ortho_weight is {self.ortho_weight} but must not be negative")

    def build(
        self, query_dim: int, width: int, depth: int, tasks: int, generator: torch.Generator
    ) -> TaskPrompts:
        """See ``PromptLearner.build``."""
        check_blocks(self.blocks, depth, "prompts.blocks")
        if self.pool < tasks or self.pool % tasks:
            raise ConfigError(f"prompts.pool is {self.pool} but must be a multiple of the {tasks} tasks")
        if not self.length:
            return TaskPrompts(tasks, width)
        if self.pool > min(query_dim, self.length * width):
            raise ShapeError(
                f"prompts.pool is {self.pool} but no more components can be orthogonal than the query has "
                f"dimensions, {query_dim}: lower prompts.pool"
            )
        return CODAPrompts(self, query_dim, width, tasks, generator)


class CODAPrompts(TaskPrompts):
    """The components of all prompted blocks, n of them.

    Attributes:
        keys: [n, M, d].
        attention: [n, M, d].
        prompts: [n, M, L, D].
    """

    needs_query = True

    def __init__(
        self, config: CODA, query_dim: int, width: int, tasks: int, generator: torch.Generator
    ) -> None:
        super().__init__(tasks, width, config.blocks)
        self.group, self.ortho_weight = config.pool // tasks, config.ortho_weight
        count = len(config.blocks)
        self.keys = nn.Parameter(torch.zeros(count, config.pool, query_dim))
        self.attention = nn.Parameter(torch.zeros(count, config.pool, query_dim))
        self.prompts = nn.Parameter(torch.zeros(count, config.pool, config.length, width))
        self.grow(generator)

    @torch.no_grad()
    def grow(self, generator: torch.Generator) -> None:
        """Draw the current task's components, orthogonal to those of the tasks before."""
        for banks in (self.keys, self.attention, self.prompts):
            for bank in banks:
                draws = torch.randn(self.group, bank[0].numel(), generator=generator)
                bank.copy_(gram_schmidt_expand(bank, draws, self.task))

    def forward(self, query: Tensor) -> PromptSet:
        """Prefix prompts for ``query`` [B, d]; the term only in training."""
        keys, values, loss = coda_prompt(
            query,
            self.keys,
            self.attention,
            self.prompts,
            task=self.task,
            group=self.group,
            ortho_weight=self.ortho_weight,
            train=self.training,
        )
        pairs = zip(keys.unbind(0), values.unbind(0), strict=True)
        return PromptSet(prefix=dict(zip(self.blocks, pairs, strict=True)), loss=loss)
