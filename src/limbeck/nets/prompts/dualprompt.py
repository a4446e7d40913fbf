"""DualPrompt: general prompts for all tasks in the first blocks, expert prompts for each task behind them.

Wang et al., ECCV 2022, arXiv 2204.04799. B batch, d query width, D width, L rows of keys and L of values, M
pool entries, k entries for a task, n prompted blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.errors import ConfigError
from limbeck.nets.prefix import Prefix
from limbeck.nets.prompts import (
    PromptLearner,
    PromptSet,
    TaskPrompts,
    check_blocks,
    check_even,
    check_range,
    uniform,
)
from limbeck.nets.prompts.l2p import reduce_sim, select, similarity


@dataclass(frozen=True)
class Experts:
    """What ``e_prompt`` chose.

    Attributes:
        prompts: [n, 2 = (keys, values), B, k L, D].
        chosen: pool ids [tables, B, k]; one table, or one for each block.
        similarity: cosines [tables, B, M].
        reduce_sim: mean over images of the summed cosines of the chosen keys, summed over tables; a scalar.
    """

    prompts: Tensor
    chosen: Tensor
    similarity: Tensor
    reduce_sim: Tensor


def task_rows(task: int, top_k: int, pool: int) -> tuple[int, int]:
    """First and last-plus-one pool entry of ``task``.

    Raises:
        ConfigError: the pool has no entries for it.
    """
    if not 0 <= task < pool // top_k:
        raise ConfigError(
            f"task {task} has no prompts: a pool of {pool} by {top_k} serves {pool // top_k} tasks"
        )
    return task * top_k, (task + 1) * top_k


def e_prompt(
    query: Tensor, keys: Tensor, prompts: Tensor, *, top_k: int = 1, task: int | None = None
) -> Experts:
    """Expert prompts: those of ``task`` for every image, or, without a task, those of the nearest keys.

    Args:
        query: [B, d]; gets no gradient.
        keys: [tables, M, d] with one table for all blocks or one for each; [M, d] is one table.
        prompts: [n, 2, M, L, D].
        top_k: entries for an image.
        task: the task that is being learned, or None.

    Raises:
        ConfigError: the pool has no entries for ``task``.

    Source: section 4.2; layout of the authors' code, heads joined.
    """
    keys = keys if keys.ndim == 3 else keys[None]
    blocks, _, pool, length, width = prompts.shape
    if task is None:
        chosen, near = select(query, keys, top_k)
        flat = prompts.transpose(1, 2).reshape(blocks * pool, 2 * length * width)
        tables = torch.arange(blocks, device=chosen.device).view(-1, 1, 1) * pool
        rows = nn.functional.embedding(chosen + tables, flat)
        found = rows.view(blocks, query.shape[0], top_k, 2, length, width)
        found = found.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
        return Experts(found, chosen, near, reduce_sim(near, chosen))
    start, stop = task_rows(task, top_k, pool)
    near = similarity(query, keys)
    chosen = torch.arange(start, stop, device=query.device).expand(len(keys), query.shape[0], -1)
    found = prompts[:, :, start:stop].flatten(2, 3).unsqueeze(2).expand(-1, -1, query.shape[0], -1, -1)
    return Experts(found, chosen, near, near[..., start:stop].sum(-1).mean(-1).sum())


def match_loss(experts: Experts, matching: Literal["mean", "sum"] = "mean") -> Tensor:
    """Distance of the queries to the chosen keys, ``sum (1 - cos)`` over keys and tables; in [0, 2 k tables].

    Args:
        experts: the choice of ``e_prompt`` in training.
        matching: over images: ``mean`` (the authors' and CDL's code), or ``sum`` (CODA-Prompt's code), which
            ties the keys' learning rate to the batch size.
    """
    tables, images, k = experts.chosen.shape
    mean = tables * k - experts.reduce_sim
    return mean if matching == "mean" else mean * images


@dataclass(frozen=True, kw_only=True)
class DualPrompt(PromptLearner):
    """DualPrompt: shared general prompts, and an expert prompt for each task found by key at test time.

    The defaults are the authors' for CIFAR-100. ``DualPrompt.from_totals`` is the preset of the CODA-Prompt
    and CDL code.

    Attributes:
        g_length: rows of the general keys and of the general values, each. 0 = none.
        g_blocks: blocks with general prompts.
        e_length: rows of the expert keys and of the expert values, each. 0 = none.
        e_blocks: blocks with expert prompts.
        pool: expert entries, M; None = as many as the tasks need.
        top_k: pool entries of a task.
        weight: weight of the matching loss.
        matching: its reduction over images, see ``match_loss``.
        shared_keys: one key table for all expert blocks, or one for each.
        copy_previous: a new task's expert prompt starts as a copy of the one before.
        start: range of the uniform start of keys and prompts. The authors' code has [0, 0.01), CODA-Prompt
            and CDL [0, 1).

    Differs: a pool that is too small for the tasks is refused; the authors' code then chooses among all.
    """

    g_length: int = 5
    g_blocks: tuple[int, ...] = (0, 1)
    e_length: int = 5
    e_blocks: tuple[int, ...] = (2, 3, 4)
    pool: int | None = None
    top_k: int = 1
    weight: float = 1.0
    matching: Literal["mean", "sum"] = "mean"
    shared_keys: bool = True
    copy_previous: bool = True
    start: tuple[float, float] = (0.0, 0.01)

    def __post_init__(self) -> None:
        check_range(self.start, "start")
        for name in ("g_length", "e_length", "weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)} but must not be negative")
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k} but must be at least 1")

    @classmethod
    def from_totals(cls, *, g_total: int = 6, e_total: int = 20, **fields: object) -> DualPrompt:
        """The CODA-Prompt and CDL preset, whose lengths count keys and values together; ``fields`` override.

        Raises:
            ConfigError: an odd total.
        """
        check_even(g_total, "g_total")
        check_even(e_total, "e_total")
        preset = {
            "g_length": g_total // 2,
            "e_length": e_total // 2,
            "shared_keys": False,
            "copy_previous": False,
            "start": (0.0, 1.0),
        }
        return cls(**{**preset, **fields})  # type: ignore[arg-type]

    def build(
        self, query_dim: int, width: int, depth: int, tasks: int, generator: torch.Generator
    ) -> TaskPrompts:
        """See ``PromptLearner.build``."""
        check_blocks(self.g_blocks, depth, "prompts.g_blocks")
        check_blocks(self.e_blocks, depth, "prompts.e_blocks")
        g_blocks = self.g_blocks if self.g_length else ()
        e_blocks = self.e_blocks if self.e_length else ()
        if not g_blocks and not e_blocks:
            return TaskPrompts(tasks, width)
        if self.pool is not None and self.pool < tasks * self.top_k:
            raise ConfigError(
                f"prompts.pool is {self.pool} but {tasks} tasks need {tasks * self.top_k} entries: raise it, "
                "or leave it out"
            )
        return DualPrompts(self, query_dim, width, tasks, g_blocks, e_blocks, generator)


class DualPrompts(TaskPrompts):
    """General prompts [n_g, 2, L_g, D], expert prompts [n_e, 2, M, L_e, D] and their keys [tables, M, d].

    Attributes:
        oracle: in evaluation, the task whose expert prompts all images get; None = choose by key.
    """

    def __init__(
        self,
        config: DualPrompt,
        query_dim: int,
        width: int,
        tasks: int,
        g_blocks: tuple[int, ...],
        e_blocks: tuple[int, ...],
        generator: torch.Generator,
    ) -> None:
        super().__init__(tasks, width, tuple(sorted({*g_blocks, *e_blocks})))
        self.config, self.g_blocks, self.e_blocks = config, g_blocks, e_blocks
        self.needs_query = bool(e_blocks)
        self.oracle: int | None = None
        self.general = self.experts = self.keys = None
        if g_blocks:
            general = uniform((len(g_blocks), 2, config.g_length, width), config.start, generator)
            self.general = nn.Parameter(general)
        if e_blocks:
            pool, tables = config.pool or tasks * config.top_k, 1 if config.shared_keys else len(e_blocks)
            shape = (len(e_blocks), 2, pool, config.e_length, width)
            self.experts = nn.Parameter(uniform(shape, config.start, generator))
            self.keys = nn.Parameter(uniform((tables, pool, query_dim), config.start, generator))

    @torch.no_grad()
    def grow(self, generator: torch.Generator) -> None:
        """The new task's expert prompts: as they were drawn, or a copy of those of the task before."""
        if self.experts is None or not self.config.copy_previous:
            return
        k = self.config.top_k
        start, stop = task_rows(self.task, k, self.experts.shape[2])
        self.experts[:, :, start:stop] = self.experts[:, :, start - k : stop - k]

    def forward(self, query: Tensor) -> PromptSet:
        """Prefixes for ``query`` [B, d]: the general ones, and the task's or the nearest key's experts."""
        prefix: dict[int, Prefix] = {}
        loss = chosen = None
        if self.experts is not None and self.keys is not None:
            task = self.task if self.training else self.oracle
            found = e_prompt(query, self.keys, self.experts, top_k=self.config.top_k, task=task)
            prefix |= _by_block(self.e_blocks, found.prompts)
            loss = self.config.weight * match_loss(found, self.config.matching) if self.training else None
            chosen = found.chosen
        if self.general is not None:
            shared = self.general.unsqueeze(2).expand(-1, -1, query.shape[0], -1, -1)
            for block, pair in _by_block(self.g_blocks, shared).items():
                prefix[block] = _joined(prefix[block], pair) if block in prefix else pair
        return PromptSet(prefix=prefix, loss=loss, chosen=chosen)

    @torch.no_grad()
    def key_accuracy(self, query: Tensor, task: int) -> Tensor | None:
        """Share of ``query`` [N, d], all of ``task``, whose nearest key is that task's; mean over key tables.

        None where there are no expert prompts.
        """
        if self.keys is None:
            return None
        start, stop = task_rows(task, self.config.top_k, self.keys.shape[1])
        nearest = similarity(query, self.keys).argmax(-1)
        return ((nearest >= start) & (nearest < stop)).float().mean()


def _by_block(blocks: tuple[int, ...], prompts: Tensor) -> dict[int, Prefix]:
    """Prompts [n, 2, B, L, D] as (keys, values) by block."""
    pairs = ((pair[0], pair[1]) for pair in prompts.unbind(0))
    return dict(zip(blocks, pairs, strict=True))


def _joined(one: Prefix, other: Prefix) -> Prefix:
    return torch.cat((one[0], other[0]), dim=1), torch.cat((one[1], other[1]), dim=1)
