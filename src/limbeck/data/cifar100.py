"""CIFAR-100: small colour photographs."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.data.files import folder_splits
from limbeck.data.images import Dataset, ImageSet, Splits, from_arrays
from limbeck.data.roots import cache_folder, fetch, find, missing, roots
from limbeck.errors import DataError

_LICENCE = "none stated (cite Krizhevsky 2009)"
_SOURCE = "www.cs.toronto.edu/~kriz/cifar.html"
_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
_MD5 = "03b5dce01913d631647c71ecec9e9cb8"
_FOLDERS = ("CIFAR-100-dataset", "cifar100", "CIFAR100", ".")
_RECORD = 2 + 3 * 32 * 32  # coarse label, fine label, three planes
_KEYS = ("x_train", "y_train", "x_test", "y_test", "fine_names")


@dataclass(frozen=True, kw_only=True)
class CIFAR100(Dataset):
    """60,000 colour images of 32 x 32 pixels, 100 classes, 50,000 + 10,000 (Krizhevsky 2009).

    Read from the binary version (``cifar-100-binary/``), from class folders (``train/<class>/*.png``,
    ``test/<class>/*.png``), or from an ``.npz`` file with the arrays x_train, y_train, x_test, y_test and
    fine_names. The version made for Python (which torchvision keeps) is a pickle and is not read.

    Attributes:
        root: folder to look in, or the ``.npz`` file; None = LIMBECK_DATA.
        file: name of an ``.npz`` file in the root. A file with fewer images is named by its size, for
            example "CIFAR-100 (100+20 per class)".
        download: fetch the binary version (161 MB) from the author's server where none is found.
    """

    root: str | None = None
    file: str | None = None
    download: bool = False

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        folders = roots(self.root)
        if self.file is not None:
            packed = find(folders, [self.file])
            if packed is None:
                raise missing(
                    f"{self.file!r} (data.file)", "set data.root or LIMBECK_DATA to the folder that has it"
                )
            return _from_npz(packed)
        if packed := find(folders, ["cifar100.npz"]) or next(
            (f for f in folders if f.suffix == ".npz"), None
        ):
            return _from_npz(packed)
        if binary := find(folders, ["cifar-100-binary/train.bin", "train.bin"]):
            return _from_binary(binary.parent)
        if pictures := find(folders, [f"{name}/train/apple" for name in _FOLDERS]):
            return folder_splits(pictures.parents[1], "CIFAR-100", side=32, licence=_LICENCE, source=_SOURCE)
        return self._download(folders)

    def _download(self, folders: list[Path]) -> Splits:
        if not self.download:
            pickled = find(folders, ["cifar-100-python"])
            found = f" ({pickled} is a pickle, which may run code, and is not read)" if pickled else ""
            raise missing(
                f"CIFAR-100{found}",
                "set data.root or LIMBECK_DATA to a folder with cifar-100-binary/ (see docs/data.md)",
                "to one with train/<class>/*.png and test/<class>/*.png",
                "set data.file to an .npz in that folder",
                "set data.download to true (161 MB)",
            )
        home = cache_folder(folders)
        archive = fetch(_URL, home / "cifar-100-binary.tar.gz", _MD5)
        with tarfile.open(archive) as tar:
            tar.extractall(home, filter="data")
        return _from_binary(home / "cifar-100-binary")


def _from_binary(folder: Path) -> Splits:
    names = (folder / "fine_label_names.txt").read_text().split()

    def split(part: str) -> ImageSet:
        raw = np.fromfile(folder / f"{part}.bin", np.uint8)
        if len(raw) == 0 or len(raw) % _RECORD:
            raise DataError(
                f"{folder / part}.bin has {len(raw)} bytes, no multiple of {_RECORD}: get it again"
            )
        records = raw.reshape(-1, _RECORD)
        images = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return from_arrays(
            f"CIFAR-100 {part}",
            images,
            records[:, 1].astype(np.int64),
            names,
            licence=_LICENCE,
            source=_SOURCE,
        )

    return Splits(split("train"), split("test"))


def _from_npz(path: Path) -> Splits:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x_train, y_train, x_test, y_test, names = (arrays[key] for key in _KEYS)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read as CIFAR-100 ({error}): it needs {', '.join(_KEYS)}"
        ) from error
    per_class = [round(len(labels) / len(names)) for labels in (y_train, y_test)]
    whole = per_class == [500, 100]
    label = "CIFAR-100" if whole else f"CIFAR-100 ({per_class[0]}+{per_class[1]} per class)"

    def split(part: str, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> ImageSet:
        return from_arrays(
            f"{label} {part}", images, labels, names.tolist(), licence=_LICENCE, source=_SOURCE
        )

    return Splits(split("train", x_train, y_train), split("test", x_test, y_test))
