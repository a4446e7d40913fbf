"""A stand-in for images collected from the web: a data set changed in style, among images of nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.data.images import Dataset, ImageSet, Pixels, Splits, from_arrays
from limbeck.data.pool import unlabelled
from limbeck.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ShiftedPool(Dataset):
    """Another data set's images with rare classes and another style, and images of no class; no labels.

    The training split holds, in this order, the shifted images, ``uniform`` images of noise and ``blends`` of
    two training images each. Its labels are never read: they are all 0. The test split stays as it is. The
    defaults are a mild shift, under which the data set's own teacher still recognises most images.

    Attributes:
        data: the other data set.
        imbalance: class k of C keeps ``imbalance ** (-k / (C - 1))`` of its samples; 1 = all of them.
        contrast: factor of a pixel's distance from the middle grey, > 0.
        brightness: added to pixels that span 0 to 1.
        noise: deviation of the normal noise on these pixels, >= 0.
        uniform: images of uniform noise.
        blends: even mixes of two training images, in their own style.
        seed: of the draws; None = the run's.

    Raises:
        ConfigError: a field out of its range.

    Source: the setting of Tang et al., ICCV 2023 (arXiv 2307.11469), small: a pool whose classes and style
    are not those that the teacher learnt.
    """

    data: Any
    imbalance: float = 3.0
    contrast: float = 0.7
    brightness: float = 0.1
    noise: float = 0.1
    uniform: int = 700
    blends: int = 700
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.imbalance >= 1 or not self.contrast > 0 or not self.noise >= 0:
            raise ConfigError(
                f"imbalance is {self.imbalance}, contrast {self.contrast}, noise {self.noise}: allowed are "
                "imbalance >= 1, contrast > 0, noise >= 0"
            )
        for name in ("uniform", "blends"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least 0")

    def seeded(self, seed: int) -> ShiftedPool:
        """With the run's seed where none is set."""
        return replace(self, data=self.data.seeded(seed), seed=seed if self.seed is None else self.seed)

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        whole: Splits = self.data.load()
        train, draws = whole.train, np.random.default_rng([self.seed or 0, 307])
        pixels = train.read(np.arange(len(train))) / 255.0
        kept = self._rare(train, draws)
        shape = pixels.shape[1:]
        pairs = draws.integers(0, len(pixels), (2, self.blends))
        images = np.concatenate(
            [self._shifted(pixels[kept], draws), draws.random((self.uniform, *shape)), pixels[pairs].mean(0)]
        )
        pool = from_arrays(
            f"a pool of {len(kept)} shifted {whole.name}, {self.uniform} noise, {self.blends} blends",
            _bytes(images), np.zeros(len(images), np.int64), train.classes,
            licence=train.licence, source=f"made of {train.source}",
        )  # fmt: skip
        return Splits(unlabelled(pool, whole.test), whole.test)

    def _rare(self, train: ImageSet, draws: np.random.Generator) -> npt.NDArray[np.int64]:
        """Positions of the samples that the tail of classes leaves, sorted."""
        labels, last = train.labels.numpy(), max(len(train.classes) - 1, 1)
        parts = [
            draws.permutation(mine)[: max(1, round(len(mine) * self.imbalance ** (-k / last)))]
            for k in range(len(train.classes))
            if len(mine := np.flatnonzero(labels == k))
        ]
        return np.sort(np.concatenate(parts))

    def _shifted(
        self, pixels: npt.NDArray[np.float64], draws: np.random.Generator
    ) -> npt.NDArray[np.float64]:
        styled = (pixels - 0.5) * self.contrast + 0.5 + self.brightness
        return styled + self.noise * draws.standard_normal(pixels.shape)


def _bytes(pixels: npt.NDArray[np.float64]) -> Pixels:
    found: Pixels = np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)
    return found
