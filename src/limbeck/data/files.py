"""Images in files: one sub-folder per class, decoded when asked for."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limbeck.data.images import ImageSet, Pixels, Positions, Splits, stratified
from limbeck.errors import ConfigError, DataError

_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file is called: others of Pillow's run programs."""
_MOST_PIXELS = 2**26
_SAMPLED = 64  # files of which the fingerprint reads the content

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such a one is refused below


def square(image: Image.Image, side: int) -> Pixels:
    """The middle square of ``image``, scaled to uint8 [side, side, 3] (RGB, bilinear, antialiased).

    Raises:
        DataError: it says that it is huge.
    """
    width, height = image.size
    if width * height > _MOST_PIXELS:
        raise DataError(
            f"{getattr(image, 'filename', 'an image')} has {width} x {height} pixels: scale it to at most "
            f"{_MOST_PIXELS} in all"
        )
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    middle = image.convert("RGB").crop((left, top, left + edge, top + edge))
    return np.asarray(middle.resize((side, side), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Files:
    """A ``Source`` of image files, each read as its middle square of one size.

    Attributes:
        paths: the files.
        side: height and width in pixels after reading.
    """

    paths: tuple[Path, ...]
    side: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.paths), self.side, self.side, 3

    def read(self, positions: Positions) -> Pixels:
        """The images at ``positions`` [n]: uint8 [n, side, side, 3].

        Raises:
            DataError: a file that is no image, or a damaged one; it is named.
        """
        return np.stack([self._open(self.paths[place]) for place in positions])

    def _open(self, path: Path) -> Pixels:
        try:
            with Image.open(path, formats=_FORMATS) as image:
                return square(image, self.side)
        except DataError:
            raise
        except Exception as error:  # decoders of damaged files raise a dozen kinds
            raise DataError(
                f"{path} cannot be read as an image ({error}): remove it or get it again"
            ) from error


def folder_splits(
    root: Path,
    name: str,
    *,
    side: int,
    licence: str,
    source: str,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> Splits:
    """The splits of an image folder.

    With ``train/`` and ``test/`` (or ``val/``) inside, those are the splits; else the classes lie directly
    in ``root`` and are split by class shares, fixed by ``split_seed``.

    Raises:
        DataError: no classes, a class without images, or splits with different classes.
    """
    if side < 1:
        raise ConfigError(f"data.side is {side} but must be at least 1 pixel")

    def image_set(part: str, files: Sequence[Path], labels: Tensor, classes: Sequence[str]) -> ImageSet:
        print_ = _fingerprint(root, files, labels, side)
        images = Files(tuple(files), side)
        return ImageSet(f"{name} {part}", images, labels, tuple(classes), licence, source, print_)

    test_folder = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    if (root / "train").is_dir() and test_folder is not None:
        return Splits(image_set("train", *_scan(root / "train")), image_set("test", *_scan(test_folder)))
    files, labels, classes = _scan(root)
    parts = stratified(labels, test_fraction, split_seed)
    train, test = (
        image_set(part, [files[place] for place in rows.tolist()], labels[rows], classes)
        for part, rows in zip(("train", "test"), parts, strict=True)
    )
    return Splits(train, test)


def _scan(folder: Path) -> tuple[list[Path], Tensor, list[str]]:
    """Files, labels and class names of the sub-folders of ``folder``, all in name order."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise DataError(f"{folder} has no sub-folders: an image folder has one per class")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in _ENDINGS)
        odd = [file for file in found if not file.is_file()]
        if odd:
            raise DataError(f"{odd[0]} is no file, or cannot be read: remove it")
        if not found:
            raise DataError(f"class folder {folder / name} has no images ({', '.join(sorted(_ENDINGS))})")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels, dtype=torch.int64), classes


def _fingerprint(root: Path, files: Sequence[Path], labels: Tensor, side: int) -> str:
    """SHA-256 over names, sizes and labels of all files, and the whole content of up to 64 of them.

    Times of change are left out, so that a copy has the fingerprint of its original. A file that is
    changed without changing its length is noticed only where it is one of the 64, evenly spread.
    """
    digest = hashlib.sha256(f"{side}\n".encode())
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n".encode())
    digest.update(labels.numpy().tobytes())
    for place in np.unique(np.linspace(0, len(files) - 1, _SAMPLED).astype(np.int64)):
        digest.update(files[place].read_bytes())
    return digest.hexdigest()
