"""Fashion-MNIST: grey pictures of clothes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from limbeck.data.images import Dataset, ImageSet, Splits, from_arrays
from limbeck.data.packed import content
from limbeck.data.roots import cache_folder, fetch, find, missing, roots
from limbeck.errors import DataError

_DEBIAN = Path("/usr/share/datasets")
_PLACES = ("fashion-mnist", "FashionMNIST/raw", "fashion_mnist", ".")
_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(Dataset):
    """70,000 grey images of 28 x 28 pixels, ten classes, 60,000 + 10,000 (Xiao, Rasul, Vollgraf 2017).

    Read from the four idx files, gzipped or not, in the layout of torchvision, of Debian's package, or
    directly in the root.

    Attributes:
        root: folder to look in; None = LIMBECK_DATA, then where Debian's package puts the files.
        download: fetch the files (31 MB) from the authors' server where they are not found.
    """

    root: str | None = None
    download: bool = False

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        folder = self._folder()
        return Splits(_split(folder, "train", "train"), _split(folder, "t10k", "test"))

    def _folder(self) -> Path:
        folders = roots(self.root) + ([_DEBIAN] if self.root is None else [])
        first = next(iter(_MD5))
        probe = find(folders, [f"{place}/{first}{end}" for place in _PLACES for end in ("", ".gz")])
        if probe is not None:
            return probe.parent
        if not self.download:
            raise missing(
                "Fashion-MNIST",
                "apt-get install dataset-fashion-mnist",
                "set data.root or LIMBECK_DATA to a folder with its four idx files",
                "set data.download to true (31 MB)",
            )
        target = cache_folder(folders) / "fashion-mnist"
        for name, md5 in _MD5.items():
            fetch(f"{_URL}/{name}.gz", target / f"{name}.gz", md5)
        return target


def _split(folder: Path, prefix: str, part: str) -> ImageSet:
    return from_arrays(
        f"Fashion-MNIST {part}",
        read_idx(folder, f"{prefix}-images-idx3-ubyte"),
        read_idx(folder, f"{prefix}-labels-idx1-ubyte").astype(np.int64),
        _CLASSES,
        licence="MIT",
        source="github.com/zalandoresearch/fashion-mnist",
    )


def read_idx(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """The array of an idx file of unsigned bytes, ``name`` or ``name.gz`` in ``folder``.

    Raises:
        DataError: the file is not there, or is damaged.
    """
    path = find([folder], [name, f"{name}.gz"])
    if path is None:
        raise DataError(f"{name}[.gz] is not in {folder}: all four idx files must lie in one folder")
    try:
        raw = content(path)
        sides = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sides)
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path} is damaged ({error}): get the file again") from error
