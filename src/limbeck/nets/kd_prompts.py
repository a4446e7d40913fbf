"""KD token and KD prompts: what a student learns from the teacher with, shared by all images and tasks.

Zhang, Guo and Xiang, arXiv 2407.13911: v2 (KD token), v3 (KDP), v4 (D-CDL). Nothing here is selected by a
query, masked by a task or started anew at a task: that is the point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.prefix import Prefix, halves
from limbeck.nets.prompts import check_even


@dataclass(frozen=True, kw_only=True)
class KDPrompts:
    """KD token and KD prompts.

    v3 and v4 are the defaults. v2 is ``layers=1, position="start", init="zeros"``.

    Attributes:
        length: rows of the KD prompts of a block: the first half are keys, the second half values.
        layers: how many blocks, from the first, have a part: block 0 the token, the others prompts; None =
            all blocks of the student, 1 = the token alone, 0 = no KD token, prompts or head.
        position: where the token stands: behind all tokens (v3, v4) or before the class token (v2).
        init: how token and prompts start: uniform in [0, 1) (v3, v4), normal with
            deviation 0.02, or zeros (v2).
        strict: only the KD token attends to the KD prompts, and no other token attends to the KD token.
            In the authors' code every token attends to everything.
        later_lr: factor on the learning rate of token and prompts from the second task on.
    """

    length: int = 6
    layers: int | None = None
    position: Literal["end", "start"] = "end"
    init: Literal["uniform", "normal", "zeros"] = "uniform"
    strict: bool = False
    later_lr: float = 1.0

    def __post_init__(self) -> None:
        check_even(self.length, "kd_prompts.length")
        if self.layers is not None and self.layers < 0:
            raise ConfigError(f"kd_prompts.layers is {self.layers} but must not be negative")
        if self.later_lr < 0:
            raise ConfigError(f"kd_prompts.later_lr is {self.later_lr} but must not be negative")

    def build(self, width: int, depth: int, generator: torch.Generator) -> KDBank | None:
        """The learnable part for a student of ``depth`` blocks; None where ``layers`` is 0.

        Raises:
            ShapeError: more layers than the student has blocks.
        """
        layers = depth if self.layers is None else self.layers
        if layers > depth:
            raise ShapeError(f"kd_prompts.layers is {layers} but the student has only {depth} blocks")
        return KDBank(self, width, layers, generator) if layers else None


class KDBank(nn.Module):
    """The KD token [1, D] of block 0 and the KD prompts [layers - 1, L, D] of the blocks behind it."""

    def __init__(self, config: KDPrompts, width: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Parameter(_start(config.init, (1, width), generator))
        rows = layers - 1 if config.length else 0
        self.prompts = (
            nn.Parameter(_start(config.init, (rows, config.length, width), generator)) if rows else None
        )

    def tokens(self, batch: int) -> Tensor:
        """The KD token for every image, [batch, 1, D], without a copy."""
        return self.token.expand(batch, -1, -1)

    def prefixes(self) -> dict[int, Prefix]:
        """The KD prompts (keys, values), each [L/2, D], by block."""
        if self.prompts is None:
            return {}
        return {block: halves(rows) for block, rows in enumerate(self.prompts.unbind(0), start=1)}


def _start(init: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if init == "uniform":
        return torch.rand(shape, generator=generator)
    return torch.randn(shape, generator=generator) * 0.02 if init == "normal" else torch.zeros(shape)


def strict_mask(tokens: int, token_at: int, task_rows: int, kd_rows: int, device: torch.device) -> Tensor:
    """Who may attend to what when distillation is kept strictly apart, as [tokens, task + KD rows + tokens].

    Args:
        tokens: sequence length, the KD token included.
        token_at: position of the KD token.
        task_rows: rows of the task prompts, which stand first among the keys.
        kd_rows: rows of the KD prompts, which stand second.

    Returns:
        bool, True = may attend: the KD token to everything, the others to all but KD prompts and KD token.
    """
    open_to_all = torch.ones(task_rows + kd_rows + tokens, dtype=torch.bool, device=device)
    open_to_all[task_rows : task_rows + kd_rows] = False
    open_to_all[task_rows + kd_rows + token_at] = False
    is_kd_token = torch.arange(tokens, device=device) == token_at
    return open_to_all | is_kd_token[:, None]
