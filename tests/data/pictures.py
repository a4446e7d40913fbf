"""Small image sets for the tests of data."""

from __future__ import annotations

import numpy as np
import torch

from limbeck.data.images import ImageSet, Pixels, Positions, Splits, from_arrays


def image_set(count: int = 40, classes: int = 4, side: int = 6, channels: int = 1, seed: int = 0) -> ImageSet:
    """Random pictures; the label of picture i is i modulo ``classes``."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    names = [f"c{c}" for c in range(classes)]
    return from_arrays("pictures", pixels, np.arange(count) % classes, names, licence="none", source="drawn")


def splits(classes: int = 4, train: int = 40, test: int = 20) -> Splits:
    """Two such sets."""
    return Splits(image_set(train, classes, seed=1), image_set(test, classes, seed=2))


class Counting:
    """A source that remembers how often each picture was read."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.reads = np.zeros(len(pixels), np.int64)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        count, height, width, channels = self.pixels.shape
        return count, height, width, channels

    def read(self, positions: Positions) -> Pixels:
        np.add.at(self.reads, positions, 1)
        return self.pixels[positions]


def counting(images: ImageSet) -> tuple[ImageSet, Counting]:
    """``images`` as a lazy set, and its source."""
    assert isinstance(images.images, np.ndarray)
    source = Counting(images.images)
    lazy = ImageSet(images.name, source, images.labels, images.classes, "none", "drawn", images.fingerprint)
    return lazy, source


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit."""
    return torch.equal(one, other)
