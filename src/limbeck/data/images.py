"""Labelled images: what every data set gives, in memory or read when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limbeck.errors import DataError

Pixels = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]


@runtime_checkable
class Source(Protocol):
    """Images that are read when asked for.

    Attributes:
        shape: (N, H, W, C): every image has one size.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def read(self, positions: Positions) -> Pixels:
        """The images at ``positions`` [n]: uint8 [n, H, W, C]. May be called from several threads."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """Images with labels; checked when made.

    Attributes:
        name: how figures on it are labelled; a subset says so in its name.
        images: uint8 [N, H, W, C], C = 1 or 3: an array, or a ``Source`` that reads them when asked.
        labels: int64 [N], 0 .. len(classes) - 1.
        classes: class names in the order of the labels.
        licence: as the source states it.
        source: where the images come from.
        fingerprint: hexadecimal hash of the content; equal content gives an equal fingerprint.
        labelled: True [N] where the label may be read in training; None = everywhere.
        noisy: True [N] where the label was made wrong, for what is reported alone; None = not known.
        trusted: True [N] where the label is known to be right: validation is taken from these; None = there
            is no telling.

    Raises:
        DataError: no images, another shape or type, as many labels as images not given, labels out of range.
    """

    name: str
    images: Pixels | Source
    labels: Tensor
    classes: tuple[str, ...]
    licence: str
    source: str
    fingerprint: str
    labelled: Tensor | None = None
    noisy: Tensor | None = None
    trusted: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[3] not in (1, 3):
            raise DataError(f"{self.name}: images have shape {shape} but must be [N, H, W, 1 or 3]")
        if isinstance(self.images, np.ndarray) and self.images.dtype != np.uint8:
            raise DataError(
                f"{self.name}: images are {self.images.dtype} but must be uint8: use from_arrays()"
            )
        if 0 in shape:
            raise DataError(f"{self.name}: no images (shape {shape}): check the root and the split")
        check_labels(self.name, self.labels, shape[0], len(self.classes))

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def lazy(self) -> bool:
        """Whether the images are read from outside the memory."""
        return not isinstance(self.images, np.ndarray)

    def read(self, positions: Positions) -> Pixels:
        """The images at ``positions`` [n]: uint8 [n, H, W, C]."""
        if isinstance(self.images, np.ndarray):
            return self.images[positions]
        return self.images.read(positions)


@dataclass(frozen=True)
class Splits:
    """The train and the test part of one data set: the same classes in the same order.

    Raises:
        DataError: the two parts name different classes.
    """

    train: ImageSet
    test: ImageSet

    def __post_init__(self) -> None:
        if self.train.classes != self.test.classes:
            raise DataError(
                f"{self.train.name} has {len(self.train.classes)} classes and {self.test.name} has "
                f"{len(self.test.classes)}, or they differ in name or order: both need the same ones"
            )

    @property
    def name(self) -> str:
        """The name of the data set: that of the train split without the word "train"."""
        return self.train.name.removesuffix(" train")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is learnt from: the base of every data set's configuration."""

    def load(self) -> Splits:
        """The two splits.

        Raises:
            DataError: the data cannot be had (the line says how to get it), or is damaged.
        """
        raise TypeError(f"{type(self).__name__} defines no load()")

    def seeded(self, seed: int) -> Dataset:
        """The data set as a run of that seed sees it: itself, unless something of it is drawn."""
        return self


def check_labels(name: str, labels: Tensor, count: int, classes: int) -> None:
    """Raise ``DataError`` unless ``labels`` are int64 [count] in 0 .. classes - 1."""
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise DataError(
            f"{name}: labels are {labels.dtype} {list(labels.shape)} but must be int64 [N]: "
            "pass whole class numbers, one per image"
        )
    if len(labels) != count:
        raise DataError(f"{name}: {len(labels)} labels for {count} images: give one label per image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise DataError(
            f"{name}: label {wrong} is out of range 0..{classes - 1} ({classes} classes): "
            "renumber the labels from 0, or name all classes"
        )


def from_arrays(
    name: str,
    images: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    classes: Sequence[str],
    *,
    licence: str,
    source: str,
) -> ImageSet:
    """An ``ImageSet`` from arrays.

    Args:
        name: how figures on it are labelled.
        images: uint8, or float in [0, 1]; [N, H, W] or [N, H, W, C].
        labels: whole numbers [N].
        classes: class names.
        licence: as the source states it.
        source: where the images come from.

    Raises:
        DataError: NaN or infinite pixels, float pixels outside [0, 1], labels that are no whole numbers,
            or whatever ``ImageSet`` refuses.
    """
    if np.issubdtype(images.dtype, np.floating):
        images = _quantise(name, images)
    if images.dtype != np.uint8:
        raise DataError(f"{name}: images are {images.dtype} but must be uint8, or float in 0..1")
    if images.ndim == 3:
        images = images[..., None]
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{name}: labels are {labels.dtype} but must be whole numbers: convert them to int64")
    numbers = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
    pixels = np.ascontiguousarray(images)
    return ImageSet(
        name, pixels, numbers, tuple(classes), licence, source, content_hash(pixels, numbers, classes)
    )


def _quantise(name: str, images: npt.NDArray[Any]) -> Pixels:
    if images.size == 0:
        return images.astype(np.uint8)
    bad = np.flatnonzero(~np.isfinite(images.reshape(len(images), -1)).all(axis=1))
    if len(bad):
        raise DataError(
            f"{name}: image {bad[0]} has NaN or infinite pixels ({len(bad)} such): remove or mend it"
        )
    if images.min() < 0 or images.max() > 1:
        raise DataError(
            f"{name}: float pixels span {images.min():g}..{images.max():g} but must lie in 0..1: scale them"
        )
    pixels: Pixels = np.rint(images * 255).astype(np.uint8)
    return pixels


def content_hash(images: Pixels, labels: Tensor, classes: Sequence[str]) -> str:
    """SHA-256 over shape, every pixel, every label and the class names: 64 hexadecimal digits."""
    digest = hashlib.sha256(repr((images.shape, tuple(classes))).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


def stratified(labels: Tensor, test_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of a train and of a test part with equal class shares: two sorted int64 tensors.

    Raises:
        DataError: a class is too small to be in both parts, or the fraction is not inside 0..1.
    """
    from sklearn.model_selection import train_test_split

    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction is {test_fraction} but must lie between 0 and 1, both excluded")
    try:
        train, test = train_test_split(
            np.arange(len(labels)), test_size=test_fraction, random_state=seed, stratify=labels.numpy()
        )
    except ValueError as error:
        raise DataError(
            f"cannot split {len(labels)} images by test_fraction {test_fraction}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(test))
