"""Images without labels from elsewhere to learn on, and another data set to be tested on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from limbeck.data.images import Dataset, ImageSet, Splits


@dataclass(frozen=True, kw_only=True)
class Pool(Dataset):
    """Trains on the images of one data set, whose labels are never read, and tests on another one.

    Attributes:
        data: whose classes and test split count.
        pool: whose training split gives the images; its classes do not count.
    """

    data: Any
    pool: Dataset

    def seeded(self, seed: int) -> Pool:
        """Both as that seed draws them."""
        return replace(self, data=self.data.seeded(seed), pool=self.pool.seeded(seed))

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        test: ImageSet = self.data.load().test
        return Splits(unlabelled(self.pool.load().train, test), test)


def unlabelled(images: ImageSet, test: ImageSet) -> ImageSet:
    """``images`` without labels as a training split for ``test``: every label is 0 and may not be read."""
    none = torch.zeros(len(images), dtype=torch.int64)
    own, other = (each.name.removesuffix(end) for each, end in ((test, " test"), (images, " train")))
    mark = hashlib.sha256(f"{images.fingerprint} unlabelled {test.classes}".encode()).hexdigest()
    return replace(
        images, name=f"{own} (learnt on {other} without labels) train", labels=none, classes=test.classes,
        labelled=none.bool(), noisy=None, trusted=None, fingerprint=mark,
    )  # fmt: skip
