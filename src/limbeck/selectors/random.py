"""A random part of the data in each epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.contracts import Selector
from limbeck.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Random(Selector):
    """A random fraction of the samples, drawn anew in each epoch: the baseline of data pruning.

    Every sample is equally likely in every epoch and none is drawn twice in one. The part is rounded up,
    so that some sample is always left.

    Attributes:
        fraction: share of the samples, in (0, 1].

    Raises:
        ConfigError: ``fraction`` is not in (0, 1].
    """

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction} but must lie in (0, 1]: 1 keeps every sample")

    def indices(self, index: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        """ceil(fraction * N) members of ``index`` [N], drawn without replacement from ``generator``."""
        keep = math.ceil(self.fraction * len(index))
        drawn = torch.randperm(len(index), generator=generator, device=generator.device)[:keep]
        return index[drawn.to(index.device)]
