"""Handwritten digits that come with scikit-learn: the data set that is always there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from limbeck.data.images import Dataset, Splits, from_arrays, stratified


@dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
    """1797 grey images of 8 x 8 pixels, ten classes (Kaynak 1995; the test part of UCI "optdigits").

    Differs: the UCI set has its own split, of which scikit-learn ships the test part only; the split here
    is stratified by class and fixed by ``split_seed``.

    Attributes:
        test_fraction: share of each class that goes to the test split.
        split_seed: fixes the split; it is apart from the run's seed, so that seeds share one test set.
    """

    test_fraction: float = 0.25
    split_seed: int = 0

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        images = np.rint(raw.images * (255 / 16)).astype(np.uint8)  # 17 grey levels over the whole range
        labels = raw.target.astype(np.int64)
        parts = stratified(torch.from_numpy(labels), self.test_fraction, self.split_seed)
        train, test = (
            from_arrays(
                f"digits {part}",
                images[rows.numpy()],
                labels[rows.numpy()],
                [str(digit) for digit in range(10)],
                licence="BSD-3-Clause (scikit-learn); data CC BY 4.0 (UCI)",
                source="sklearn.datasets.load_digits (test part of UCI optdigits)",
            )
            for part, rows in zip(("train", "test"), parts, strict=True)
        )
        return Splits(train, test)
