"""Attention-based prompt mapping: the teacher's prompts, made to fit the student.

Zhang, Guo and Xiang, arXiv 2407.13911 v1 (CDL-Prompt). The teacher's prompts have L_T rows of width D_T, the
mapped ones L rows of width D; M components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.prefix import Prefix
from limbeck.nets.prompts import TaskPrompts, check_blocks, check_even
from limbeck.nets.prompts.coda import coda_prompt, gram_schmidt_expand


def mapping_query(teacher_keys: Tensor, teacher_values: Tensor) -> Tensor:
    """The mean row of the teacher's prompts [B, L_T, D_T] of one block, detached, [B, D_T]."""
    return torch.cat((teacher_keys, teacher_values), dim=1).mean(dim=1).detach()


def prompt_map(
    teacher_keys: Tensor, teacher_values: Tensor, keys: Tensor, attention: Tensor, prompts: Tensor
) -> Prefix:
    """Student prompts from the teacher's, through a bank of components attended to by the mean teacher row.

    Args:
        teacher_keys: [B, L_T, D_T]; gets no gradient.
        teacher_values: [B, L_T, D_T]; gets no gradient.
        keys: [M, D_T].
        attention: [M, D_T].
        prompts: [M, L, D].

    Returns:
        keys and values, each [B, L/2, D].
    """
    query = mapping_query(teacher_keys, teacher_values)
    mapped_keys, mapped_values, _ = coda_prompt(query, keys, attention, prompts, task=0, group=len(keys))
    return mapped_keys, mapped_values


@dataclass(frozen=True, kw_only=True)
class PromptMap:
    """Which of the teacher's prompts are mapped, and through how many components.

    Attributes:
        components: M, which serve all tasks.
        length: rows of a mapped prompt, L: the first half are keys, the second half values.
        blocks: blocks whose teacher prompts are mapped, into the student's block of the same number.

    Differs: the authors' code makes a bank of 100 for 10 tasks and never grows it, so that only its first 10
    components are ever read; ``components`` counts those.
    """

    components: int = 10
    length: int = 8
    blocks: tuple[int, ...] = (0, 1, 2, 3, 4)

    def __post_init__(self) -> None:
        check_even(self.length, "prompt_map.length")
        if self.components < 1 or not self.length or not self.blocks:
            raise ConfigError("prompt_map needs at least one component, two rows and one block")

    def check(self, depth: int) -> None:
        """Raise ``ShapeError`` unless the blocks are inside a student of ``depth`` blocks."""
        check_blocks(self.blocks, depth, "prompt_map.blocks")

    def build(self, teacher: TaskPrompts, width: int, generator: torch.Generator) -> Mapper:
        """The banks for one teacher's prompts and a student of ``width``.

        Raises:
            ShapeError: the teacher has no prefix prompts in a mapped block, or is too narrow for the bank.
        """
        missing = sorted(set(self.blocks) - set(teacher.blocks))
        if missing:
            raise ShapeError(
                f"prompt_map.blocks has {missing}, where the teacher has no prompts: choose from "
                f"{list(teacher.blocks)}"
            )
        if self.components > teacher.width:
            raise ShapeError(
                f"prompt_map.components is {self.components} but no more than the teacher's width, "
                f"{teacher.width}, can be orthogonal"
            )
        return Mapper(self, teacher.width, width, generator)


class Mapper(nn.Module):
    """The banks of the n mapped blocks: keys and attention [n, M, D_T], prompts [n, M, L, D]."""

    def __init__(self, config: PromptMap, teacher_width: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.blocks = config.blocks
        shape = (len(config.blocks), config.components)
        self.keys = nn.Parameter(_orthogonal((*shape, teacher_width), generator))
        self.attention = nn.Parameter(_orthogonal((*shape, teacher_width), generator))
        self.prompts = nn.Parameter(_orthogonal((*shape, config.length, width), generator))

    def forward(self, teacher: Mapping[int, Prefix]) -> dict[int, Prefix]:
        """Mapped prompts (keys, values), each [B, L/2, D], from the teacher's by block."""
        return {
            block: prompt_map(*teacher[block], self.keys[i], self.attention[i], self.prompts[i])
            for i, block in enumerate(self.blocks)
        }


def _orthogonal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    banks = torch.zeros(shape)
    draws = torch.randn(banks.flatten(2).shape, generator=generator)
    return torch.stack([gram_schmidt_expand(*pair, task=0) for pair in zip(banks, draws, strict=True)])
