"""How samples are put in order and cut into batches: the same for every source of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from limbeck.data import chance

_ORDER = 101  # purpose of the draw, apart from those of the views


class Ordered:
    """An order that is a pure function of (seed, epoch), so that an epoch can be entered at any step.

    Attributes:
        index: positions [count] of the samples, int64.
        batch_size: samples per batch; the last batch is smaller unless ``drop_last``.
        seed: fixes the order.
        shuffle: a new order each epoch; else the order of ``index``.
        drop_last: leave out a last batch that is not full.
    """

    index: Tensor
    batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool

    @property
    def count(self) -> int:
        """Samples that an epoch goes over (before ``drop_last``)."""
        return len(self.index)

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def in_order(self, batch_size: int) -> Self:
        """The same samples in the order of the index, none left out."""
        plain = copy.copy(self)
        plain.shuffle, plain.drop_last, plain.batch_size = False, False, batch_size
        return plain

    def parts(self, epoch: int, start: int) -> Iterator[Tensor]:
        """The positions of the batches ``start``, ``start + 1``, ... of ``epoch``."""
        order = self.index
        if self.shuffle:
            order = order[torch.from_numpy(chance.order(self.count, self.seed, _ORDER, epoch))]
        yield from torch.split(order, self.batch_size)[start : self.steps]
