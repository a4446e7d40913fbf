"""APT: vectors added to the class token's key and value, averaged over tasks.

Additive prompt tuning as the base learner of CDL's newest version (arXiv 2407.13911, D-CDL).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck.errors import ConfigError
from limbeck.nets.prompts import HeadKind, PromptLearner, PromptSet, TaskPrompts, check_blocks


def running_average(average: Tensor, new: Tensor, keep: float) -> Tensor:
    """``keep`` of the average and the rest of what is new."""
    return keep * average + (1 - keep) * new


@dataclass(frozen=True, kw_only=True)
class APT(PromptLearner):
    """APT: one additive vector for the class token's key and one for its value, in each block.

    Attributes:
        keep: share that the running average keeps when a task is merged into it.
        blocks: the prompted blocks; None = all.
        std: deviation of the normal start.

    Source: the CDL authors' code. The vectors go on learning from task to task; after each task they are
    merged into a running average (the first task's are taken as they are), which evaluation uses.

    Differs: merging is done as soon as a network has learned its task, so before it teaches; the authors'
    code merges the teacher's only after the student has learned. Before the first merge evaluation uses the
    vectors themselves, not zeros.
    """

    keep: float = 0.7
    blocks: tuple[int, ...] | None = None
    std: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"keep is {self.keep} but must be from 0 to 1")
        if self.std < 0:
            raise ConfigError(f"std is {self.std} but must not be negative")

    def build(
        self, query_dim: int, width: int, depth: int, tasks: int, generator: torch.Generator
    ) -> TaskPrompts:
        """See ``PromptLearner.build``."""
        blocks = tuple(range(depth)) if self.blocks is None else self.blocks
        check_blocks(blocks, depth, "prompts.blocks")
        return AdditivePrompts(self, width, tasks, blocks, generator) if blocks else TaskPrompts(tasks, width)


class AdditivePrompts(TaskPrompts):
    """The vectors that learn and their running average, each [n, 2 = (key, value), D].

    Attributes:
        merged: tasks that are in the average.
    """

    additive = True
    head: ClassVar[HeadKind] = "normalised"

    def __init__(
        self, config: APT, width: int, tasks: int, blocks: tuple[int, ...], generator: torch.Generator
    ) -> None:
        super().__init__(tasks, width, blocks)
        self.keep, self.merged = config.keep, 0
        start = torch.empty(len(blocks), 2, width)
        nn.init.trunc_normal_(start, std=config.std, generator=generator)
        self.prompts = nn.Parameter(start)
        self.average: Tensor
        self.merged_count: Tensor
        self.register_buffer("average", torch.zeros_like(start))
        self.register_buffer("merged_count", torch.zeros((), dtype=torch.int64))

    def restore(self) -> None:
        """See ``TaskPrompts.restore``."""
        super().restore()
        self.merged = int(self.merged_count)

    @torch.no_grad()
    def finish_task(self) -> None:
        """Merge the vectors into the average, once a task."""
        if self.merged > self.task:
            return
        new = running_average(self.average, self.prompts, self.keep) if self.merged else self.prompts
        self.average.copy_(new)
        self.merged = self.task + 1
        self.merged_count.fill_(self.merged)

    def forward(self, query: Tensor) -> PromptSet:
        """The vectors in training, their average in evaluation; ``query`` is not read."""
        vectors = self.prompts if self.training or not self.merged else self.average
        pairs = ((pair[0], pair[1]) for pair in vectors.unbind(0))
        return PromptSet(additive=dict(zip(self.blocks, pairs, strict=True)))
