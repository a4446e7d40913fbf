"""Batches from tensors, from any torch data set, or from a ready data loader."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from limbeck.contracts import Batch
from limbeck.data.ordered import Ordered
from limbeck.errors import DataError


class Samples(Ordered):
    """Batches over a map-style data set of ``(input, label)``, in an order that can be replayed.

    Args:
        dataset: gives ``(input, label)`` for 0 .. len - 1; inputs of one shape.
        batch_size: samples per batch.
        seed: fixes the order.
        shuffle: a new order each epoch.
        drop_last: leave out a last batch that is not full.
        replays: 1 where a sample is the same each time it is read (its teacher's answer can be kept);
            None where it is drawn anew.

    Raises:
        DataError: an empty data set, or one without a length.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        replays: int | None = 1,
    ) -> None:
        if not isinstance(dataset, Sized) or len(dataset) == 0:
            raise DataError(
                "the data set has no length, or no samples: pass a map-style data set or a loader"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.drop_last, self.replays = shuffle, drop_last, replays
        self.index = torch.arange(len(dataset))

    def describe(self) -> dict[str, Any]:
        """What the samples are, as far as that can be told: tensors by content, others by type and length."""
        digest = hashlib.sha256(type(self.dataset).__name__.encode())
        if isinstance(self.dataset, TensorDataset):
            for values in self.dataset.tensors:
                digest.update(values.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return {"dataset": digest.hexdigest(), "count": self.count}

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from step ``start`` on."""
        for part in self.parts(epoch, start):
            if isinstance(self.dataset, TensorDataset):
                inputs, labels = self.dataset[part]
            else:
                inputs, labels = self._read(part)
            yield as_batch(inputs, labels, part, epoch)

    def _read(self, part: Tensor) -> tuple[Tensor, Any]:
        """The samples ``part`` [B] in one piece."""
        found = []
        for place in part.tolist():
            try:
                found.append(self.dataset[place])
            except Exception as error:  # of a data set that is not ours
                raise DataError(
                    f"sample {place} cannot be read ({told(error)}): mend the data set"
                ) from error
        try:
            inputs, labels = default_collate(found)
        except (RuntimeError, TypeError) as error:
            raise DataError(
                f"samples {part.tolist()[:4]}, ... do not fit together ({told(error)}): give them one shape"
            ) from error
        return inputs, labels


class Loader:
    """A ready data loader, made repeatable: torch's randomness is its own and set by (seed, epoch).

    Its samples have no known position, so nothing is cached. Workers and transforms that draw from other
    generators than torch's are not replayed.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int = 0) -> None:
        if len(loader) == 0:
            raise DataError("the data loader has no batches: give it data, or set drop_last=False")
        self.loader, self.seed = loader, seed

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return len(self.loader)

    def _seed_of(self, epoch: int) -> int:
        return int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0] >> 1)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch``; those before ``start`` are drawn and dropped."""
        state = torch.Generator().manual_seed(self._seed_of(epoch)).get_state()
        if self.loader.generator is not None:
            self.loader.generator.set_state(state)
        source: Iterator[Any] | None = None
        for step in range(self.steps):
            outer = torch.get_rng_state()
            torch.set_rng_state(state)
            try:
                source = iter(self.loader) if source is None else source
                inputs, labels = next(source)
            except Exception as error:  # of a loader that is not ours
                raise DataError(
                    f"batch {step} of the data loader cannot be read ({told(error)}): mend the loader"
                ) from error
            finally:
                state = torch.get_rng_state()
                torch.set_rng_state(outer)
            if step >= start:
                yield as_batch(inputs, labels, torch.full((len(labels),), -1), epoch)


def told(error: Exception) -> str:
    """The kind of an error and the last line of its text, which is a worker's own where one raised it."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def as_batch(inputs: Tensor, labels: Any, index: Tensor, epoch: int) -> Batch:
    """A ``Batch`` from what a loader gives; labels become int64.

    Raises:
        DataError: the labels are no whole numbers [B].
    """
    numbers = torch.as_tensor(labels)
    if numbers.ndim != 1 or numbers.is_floating_point() or len(numbers) != len(inputs):
        raise DataError(f"labels are {numbers.dtype} {list(numbers.shape)} but must be whole numbers [batch]")
    if numbers.numel() and int(numbers.min()) < 0:
        raise DataError(f"a label is {int(numbers.min())}: allowed are class numbers from 0")
    return Batch(
        inputs=inputs, labels=numbers.long(), index=index.to(torch.int64), view=torch.zeros_like(index)
    )
