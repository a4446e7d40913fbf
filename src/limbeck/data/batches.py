"""Batches of images: an order and views that can be replayed from any step."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from limbeck.contracts import Batch
from limbeck.data.images import ImageSet, Pixels, Positions, check_labels
from limbeck.data.ordered import Ordered
from limbeck.data.views import Views
from limbeck.errors import ConfigError, DataError

_CHUNK = 512  # images rendered at a time when a whole view is kept


class Store:
    """Rendered images of one list of samples, kept in memory where they fit.

    Kept are, as far as ``limit`` bytes allow: whole views where there is a fixed number of them; else the
    undecoded-again pixels of a lazy source.
    """

    def __init__(
        self,
        images: ImageSet,
        index: Tensor,
        views: Views,
        *,
        size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        limit: int,
    ) -> None:
        self.images, self.views, self.size, self.channels, self.seed = images, views, size, channels, seed
        self.mean, self.std = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
        if not bool((self.std > 0).all()):
            raise ConfigError(f"std is {list(std)} but every entry must be above 0")
        self._index = torch.unique(index)  # sorted: rows are found by bisection
        rounds = 1 if views.plain else views.count
        view_bytes = len(self._index) * channels * size * size * 4
        self._keeps_views = rounds is not None and rounds * view_bytes <= limit
        self._rendered: dict[int, Tensor] = {}
        self._lock = threading.Lock()
        shape = (len(self._index), *images.images.shape[1:])
        self._keeps_pixels = images.lazy and not self._keeps_views and int(np.prod(shape)) <= limit
        self._pixels = np.empty(shape if self._keeps_pixels else (0,), np.uint8)
        self._have = np.zeros(len(self._index), bool)

    def get(self, index: Tensor, view: int) -> Tensor:
        """Normalised images [B, channels, size, size] float32 of the samples ``index`` [B]."""
        if not self._keeps_views:
            return self._render(index, view)
        with self._lock:  # the threads that read ahead must not render one view twice
            if view not in self._rendered:
                parts = [self._render(part, view) for part in torch.split(self._index, _CHUNK)]
                self._rendered[view] = torch.cat(parts)
        return self._rendered[view][torch.searchsorted(self._index, index)]

    def _render(self, index: Tensor, view: int) -> Tensor:
        pixels = torch.from_numpy(self._read(index.numpy()))
        shown = self.views.render(
            pixels,
            index,
            torch.full_like(index, view),
            seed=self.seed,
            size=self.size,
            channels=self.channels,
        )
        return (shown - self.mean) / self.std

    def _read(self, positions: Positions) -> Pixels:
        if not self._keeps_pixels:
            return self.images.read(positions)
        rows = np.searchsorted(self._index.numpy(), positions)
        missing = ~self._have[rows]
        if missing.any():
            self._pixels[rows[missing]] = self.images.read(positions[missing])
            self._have[rows[missing]] = True
        return self._pixels[rows]


class Batches(Ordered):
    """Batches over some samples of an image set.

    The order is a pure function of (seed, epoch) and a view one of (seed, sample, view), so
    ``epoch(e, start=k)`` gives from step k on exactly what ``epoch(e)`` would have given, bit for bit.
    A lazy source is read ahead by a few threads; the order stays.

    Attributes:
        labels: labels [N] of the whole image set, in the numbering that batches carry.
    """

    def __init__(
        self,
        images: ImageSet,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        views: Views | None = None,
        *,
        batch_size: int,
        size: int,
        channels: int,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        limit: int = 256 * 2**20,
    ) -> None:
        """Plan the batches; no image is read yet.

        Args:
            images: where the pixels come from.
            index: positions [n] of the samples to go over, int64; None = all.
            labels: labels [N] of the whole image set, such as a stream's; None = the image set's own.
            views: augmentation; None = none.
            batch_size: at least 1.
            size: height and width of the inputs in pixels.
            channels: channels of the inputs.
            mean: subtracted from the values in [0, 1]: one number or one per channel.
            std: divided by after that: one number or one per channel.
            seed: fixes order and views.
            shuffle: a new order each epoch; else the order of ``index``.
            drop_last: leave out a last batch that is not full.
            limit: bytes of memory that rendered views, or else a lazy source's pixels, may take.

        Raises:
            ConfigError: batch_size, size, mean or std is wrong, or not one batch can be made.
            DataError: index or labels do not fit the images.
        """
        self.images = images
        self.index = torch.arange(len(images)) if index is None else index.to(torch.int64)
        self.labels = images.labels if labels is None else labels
        self.batch_size, self.seed, self.shuffle, self.drop_last = batch_size, seed, shuffle, drop_last
        self.views = views or Views()
        if size < 1:
            raise ConfigError(f"size is {size} but must be at least 1 pixel")
        check_labels(images.name, self.labels, len(images), len(images.classes))
        self._check()
        self._store = Store(
            images,
            self.index,
            self.views,
            size=size,
            channels=channels,
            mean=mean,
            std=std,
            seed=seed,
            limit=limit,
        )

    def _check(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size} but must be at least 1")
        if self.count == 0:
            raise DataError(f"{self.images.name}: no samples to make batches of: the index is empty")
        low, high = int(self.index.min()), int(self.index.max())
        if low < 0 or high >= len(self.images):
            wrong = low if low < 0 else high
            raise DataError(f"{self.images.name}: sample {wrong} is not in 0..{len(self.images) - 1}")
        if self.steps == 0:
            raise ConfigError(
                f"batch_size is {self.batch_size} but only {self.count} samples are there and drop_last "
                "is on: use a smaller batch_size or drop_last: false"
            )

    @property
    def noisy(self) -> Tensor | None:
        """True [N] where the label is known to be wrong; None = not known."""
        return self.images.noisy

    @property
    def replays(self) -> int | None:
        """Number of different views of each sample; None where every epoch brings fresh ones."""
        return 1 if self.views.plain else self.views.count

    def subset(self, index: Tensor) -> Self:
        """The same batches over a part of the samples; what is kept in memory is shared.

        Args:
            index: positions [m] in the image set, each of them among ``self.index``.

        Raises:
            DataError: a position that is not among ``self.index``, or none at all.
        """
        stray = index[~torch.isin(index, self.index)]
        if len(stray):
            raise DataError(f"{self.images.name}: sample {int(stray[0])} is not among those of these batches")
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, index=index.to(torch.int64))
        part._check()
        return part

    def describe(self) -> dict[str, Any]:
        """All that the pixels of (sample, view) depend on, as JSON-able values: the address of a cache."""
        store = self._store
        return {
            "images": self.images.fingerprint,
            "views": asdict(self.views),
            "seed": None if self.views.plain else self.seed,
            "size": store.size,
            "channels": store.channels,
            "mean": store.mean.flatten().tolist(),
            "std": store.std.flatten().tolist(),
        }

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches ``start``, ``start + 1``, ... of ``epoch``; nothing random is carried over."""
        parts = list(self.parts(epoch, start))
        view = self.views.number(epoch)
        if not self.images.lazy:
            return (self._batch(part, view) for part in parts)
        return self._ahead(parts, view)

    def _batch(self, index: Tensor, view: int) -> Batch:
        return Batch(
            inputs=self._store.get(index, view),
            labels=self.labels[index],
            index=index,
            view=torch.full_like(index, view),
            labelled=None if self.images.labelled is None else self.images.labelled[index],
        )

    def _ahead(self, parts: Sequence[Tensor], view: int) -> Iterator[Batch]:
        """The batches in order, a few of them being read by threads in advance."""
        workers = min(4, os.cpu_count() or 1)
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(workers, thread_name_prefix="limbeck-read") as pool:
            try:
                for part in parts:
                    waiting.append(pool.submit(self._batch, part, view))
                    if len(waiting) > workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _per_channel(field: str, values: Sequence[float], channels: int) -> Tensor:
    if len(values) not in (1, channels):
        raise ConfigError(f"{field} has {len(values)} entries but must have 1 or {channels}, one per channel")
    return torch.tensor(list(values), dtype=torch.float32).reshape(-1, 1, 1)
