"""Prompt learners: what is learned besides a frozen transformer, task by task.

A choice is a frozen dataclass under ``PromptLearner``; its ``build`` gives a ``TaskPrompts`` module that
turns a query into a ``PromptSet``. B batch, L rows, D width of the network, d width of the query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import ConfigError, ShapeError

HeadKind = Literal["linear", "zero", "normalised"]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one forward pass.

    Attributes:
        prefix: (keys, values), each [B, L, D], by block.
        prepend: tokens [B, L, D] put in front of the sequence of block 0.
        additive: (key, value), each [D], added to the class token's, by block.
        loss: the learner's own scalar term, already weighted; None where it has none.
        chosen: ids [..., B, k] of the chosen pool entries; None where nothing is chosen.
    """

    prefix: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    prepend: Tensor | None = None
    additive: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    loss: Tensor | None = None
    chosen: Tensor | None = None


class TaskPrompts(nn.Module):
    """The base of every built prompt learner; alone it holds no prompts, which is the linear probe.

    The number of the current task is a buffer, so that it is saved and loaded with the prompts, and mirrored
    as ``task``, so that no step reads it from the device.

    Attributes:
        task: the current task, from 0.
        blocks: the blocks that get prefix or additive prompts.
        needs_query: whether ``forward`` reads its query.
        additive: whether vectors are added to the class token's key and value.
        reads_prompts: whether the head reads the mean of the prepended tokens, not the class token.
        head: which head belongs to the method.
    """

    needs_query: bool = False
    additive: ClassVar[bool] = False
    head: ClassVar[HeadKind] = "linear"
    reads_prompts: ClassVar[bool] = False

    def __init__(self, tasks: int, width: int, blocks: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.tasks, self.width, self.blocks = tasks, width, blocks
        self.task = 0
        self.task_count: Tensor
        self.register_buffer("task_count", torch.zeros((), dtype=torch.int64))
        add_hook: Any = self.register_load_state_dict_post_hook
        add_hook(_restore)

    def start_task(self, task: int, generator: torch.Generator) -> None:
        """Make ``task`` the current one. Asking for the current task again changes nothing.

        Raises:
            ConfigError: a task was skipped, or there are more tasks than were planned.
        """
        if task == self.task:
            return
        if task != self.task + 1 or task >= self.tasks:
            raise ConfigError(
                f"prompts cannot start task {task}: they are at task {self.task} of {self.tasks} and tasks "
                "start in order from 0; build them for more tasks"
            )
        self.task = task
        self.task_count.fill_(task)
        self.grow(generator)

    def grow(self, generator: torch.Generator) -> None:
        """Prepare the prompts of the task that has just become the current one."""

    def finish_task(self) -> None:
        """Settle what the current task has learned, before it teaches or is tested."""

    def restore(self) -> None:
        """Mirror the counters that were loaded."""
        self.task = int(self.task_count)

    def key_accuracy(self, query: Tensor, task: int) -> Tensor | None:
        """Share of ``query`` [N, d], all of ``task``, that find its prompts; None where no key is one's."""
        return None

    def forward(self, query: Tensor) -> PromptSet:
        """The prompts for ``query`` [B, d]; training or evaluation by ``self.training``."""
        return PromptSet()


def _restore(module: Any, _keys: Any) -> None:
    module.restore()


@dataclass(frozen=True, kw_only=True)
class PromptLearner:
    """Which prompts are learned, and how. Itself it learns none: the linear probe."""

    def build(
        self, query_dim: int, width: int, depth: int, tasks: int, generator: torch.Generator
    ) -> TaskPrompts:
        """The module, initialised from ``generator`` alone.

        Args:
            query_dim: width of the query that selects prompts.
            width: width of the network that is prompted.
            depth: its number of blocks.
            tasks: how many tasks will come.

        Raises:
            ConfigError: fields that do not fit each other or ``tasks``.
            ShapeError: fields that do not fit the network.
        """
        return TaskPrompts(tasks, width)


def check_blocks(blocks: tuple[int, ...], depth: int, where: str) -> None:
    """Raise ``ShapeError`` unless ``blocks`` are distinct and inside a network of ``depth`` blocks."""
    if len(set(blocks)) < len(blocks) or any(not 0 <= b < depth for b in blocks):
        raise ShapeError(f"{where} is {list(blocks)} but must be distinct numbers from 0 to {depth - 1}")


def check_even(length: int, where: str) -> None:
    """Raise ``ConfigError`` unless ``length`` can be halved into keys and values."""
    if length < 0 or length % 2:
        raise ConfigError(
            f"{where} is {length} but must be even and not negative: half are keys, half are values"
        )


def check_range(bounds: tuple[float, float], where: str) -> None:
    """Raise ``ConfigError`` unless ``bounds`` are a low and a higher number."""
    low, high = bounds
    if not low < high:
        raise ConfigError(f"{where} is {list(bounds)} but must be a low and a higher number")


def uniform(shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """A tensor drawn evenly from ``bounds``."""
    low, high = bounds
    return torch.rand(shape, generator=generator) * (high - low) + low
