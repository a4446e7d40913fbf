"""Any image classification data set of the Hugging Face hub, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from limbeck.data.files import square
from limbeck.data.images import Dataset, ImageSet, Pixels, Positions, Splits, check_labels
from limbeck.errors import DataError, unknown


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Dataset):
    """A data set read with the library ``datasets`` (extra ``language``), from the hub or from a local copy.

    Attributes:
        path: name on the hub, for example "uoft-cs/cifar100", or a local folder.
        config: name of the configuration, where the data set has several.
        train: name of the train split.
        test: name of the test split.
        image: name of the column with images.
        label: name of the column with class numbers.
        side: pixels of the square that each image is read as: its middle, scaled.
    """

    path: str
    config: str | None = None
    train: str = "train"
    test: str = "test"
    image: str = "image"
    label: str = "label"
    side: int = 256

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        parts = load_dataset(self.path, self.config)
        for field in ("train", "test"):
            if getattr(self, field) not in parts:
                raise unknown("split", getattr(self, field), parts, where=f"data.{field}")
        return Splits(self._split("train", parts[self.train]), self._split("test", parts[self.test]))

    def _split(self, part: str, table: Any) -> ImageSet:
        for field in ("image", "label"):
            if getattr(self, field) not in table.column_names:
                raise unknown("column", getattr(self, field), table.column_names, where=f"data.{field}")
        names = getattr(table.features[self.label], "names", None)
        values = np.asarray(table[self.label])
        if not np.issubdtype(values.dtype, np.integer):
            raise DataError(f"{self.path}: column {self.label!r} holds {values.dtype}, not class numbers")
        labels = torch.from_numpy(values.astype(np.int64))
        classes = tuple(names) if names else tuple(str(c) for c in range(int(labels.max()) + 1))
        check_labels(f"{self.path} {part}", labels, len(table), len(classes))
        return ImageSet(
            name=f"{self.path} {part}",
            images=Rows(table, self.image, self.side),
            labels=labels,
            classes=classes,
            licence=table.info.license or "none stated",
            source=f"huggingface.co/datasets/{self.path}",
            fingerprint=f"{table._fingerprint}-{self.side}",
        )


def load_dataset(path: str, config: str | None) -> Any:
    """A data set of the hub, or a local copy, split by split.

    Raises:
        DataError: it cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data set {path!r} needs the library datasets: pip install 'limbeck[language]'"
        ) from error
    try:
        return datasets.load_dataset(path, config)
    except Exception as error:  # the library raises a dozen kinds, its network client others
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot load {path!r} from the Hugging Face hub ({reason}): check the name, go online once so "
            "that it is kept, or set data.path to a local copy"
        ) from error


@dataclass(frozen=True)
class Rows:
    """A ``Source`` over a column of images of a ``datasets`` table."""

    table: Any
    column: str
    side: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.table), self.side, self.side, 3

    def read(self, positions: Positions) -> Pixels:
        """The images at ``positions`` [n]: uint8 [n, side, side, 3].

        Raises:
            DataError: a row that holds no image.
        """
        found = [self.table[int(place)][self.column] for place in positions]
        for place, image in zip(positions, found, strict=True):
            if not isinstance(image, Image.Image):
                raise DataError(
                    f"row {place} of column {self.column!r} holds {type(image).__name__}, no image"
                )
        return np.stack([square(image, self.side) for image in found])
