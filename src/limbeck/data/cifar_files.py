"""The files that CIFAR-10 and CIFAR-100 come in: the binary version, class folders, or one ``.npz``."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.data.files import folder_splits
from limbeck.data.images import ImageSet, Splits, from_arrays
from limbeck.data.packed import check_archive
from limbeck.data.roots import cache_folder, fetch, find, missing, roots
from limbeck.errors import DataError

_LICENCE = "none stated (cite Krizhevsky 2009)"
_SOURCE = "www.cs.toronto.edu/~kriz/cifar.html"
_PIXELS = 3 * 32 * 32  # three planes


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How the files of one of the two sets are called and laid out.

    Attributes:
        name: of the set.
        per_class: train and test images of each class in the whole set.
        npz: name of an ``.npz`` file that is found without being named.
        names_key: the array of the class names in it.
        binary: folder of the binary version.
        names_file: the class names in it, one a line.
        train: files of the train split in it.
        test: files of the test split in it.
        labels: bytes of labels before each image; the last is the class.
        first_class: a class, by which a folder of classes is known.
        folders: names of folders that hold ``train/<class>/``.
        archive: the binary version on the author's server.
        md5: of the archive.
        megabytes: size of the archive.
        pickled: folder of the version made for Python.
    """

    name: str
    per_class: tuple[int, int]
    npz: str
    names_key: str
    binary: str
    names_file: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int
    first_class: str
    folders: tuple[str, ...]
    archive: str
    md5: str
    megabytes: int
    pickled: str


def load(kind: Kind, root: str | None, file: str | None, download: bool) -> Splits:
    """Both splits, from the first form that is found.

    Args:
        kind: which set.
        root: folder to look in, or the ``.npz`` file; None = LIMBECK_DATA.
        file: name of an ``.npz`` file in the root.
        download: fetch the binary version where none is found.

    Raises:
        DataError: the data cannot be had, or is damaged.
    """
    folders = roots(root)
    if file is not None:
        packed = find(folders, [file])
        if packed is None:
            raise missing(f"{file!r} (data.file)", "set data.root or LIMBECK_DATA to the folder that has it")
        return _from_npz(kind, packed)
    if packed := find(folders, [kind.npz]) or next((f for f in folders if f.suffix == ".npz"), None):
        return _from_npz(kind, packed)
    first = kind.train[0]
    if binary := find(folders, [f"{kind.binary}/{first}", first]):
        return _from_binary(kind, binary.parent)
    if pictures := find(folders, [f"{name}/train/{kind.first_class}" for name in (*kind.folders, ".")]):
        return folder_splits(pictures.parents[1], kind.name, side=32, licence=_LICENCE, source=_SOURCE)
    if download:
        return _download(kind, folders)
    pickled = find(folders, [kind.pickled])
    found = f" ({pickled} is a pickle, which may run code, and is not read)" if pickled else ""
    raise missing(
        f"{kind.name}{found}",
        f"set data.root or LIMBECK_DATA to a folder with {kind.binary}/ (see docs/data.md)",
        "to one with train/<class>/*.png and test/<class>/*.png",
        "set data.file to an .npz in that folder",
        f"set data.download to true ({kind.megabytes} MB)",
    )


def _download(kind: Kind, folders: list[Path]) -> Splits:
    home = cache_folder(folders)
    archive = fetch(kind.archive, home / kind.archive.rpartition("/")[2], kind.md5)
    with tarfile.open(archive) as tar:
        tar.extractall(home, filter="data")
    return _from_binary(kind, home / kind.binary)


def _from_binary(kind: Kind, folder: Path) -> Splits:
    try:
        names = (folder / kind.names_file).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / kind.names_file} holds no class names ({error}): get it again") from error

    def split(part: str, files: Sequence[str]) -> ImageSet:
        records = np.concatenate([_records(folder / name, kind.labels) for name in files])
        images = records[:, kind.labels :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = records[:, kind.labels - 1].astype(np.int64)
        return from_arrays(f"{kind.name} {part}", images, labels, names, licence=_LICENCE, source=_SOURCE)

    return Splits(split("train", kind.train), split("test", kind.test))


def _records(path: Path, labels: int) -> npt.NDArray[np.uint8]:
    size = labels + _PIXELS
    try:
        raw = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise DataError(f"{path} is not there but files beside it are: get the archive again") from None
    if len(raw) == 0 or len(raw) % size:
        raise DataError(f"{path} has {len(raw)} bytes, no multiple of {size}: get it again")
    return raw.reshape(-1, size)


def _from_npz(kind: Kind, path: Path) -> Splits:
    keys = ("x_train", "y_train", "x_test", "y_test", kind.names_key)
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as arrays:
            found = [arrays[key] for key in keys]
        if not all(isinstance(each, np.ndarray) and each.ndim and len(each) for each in found):
            raise DataError(
                f"{path} holds other things than arrays of images, labels and names: get it again"
            )
        x_train, y_train, x_test, y_test, names = found
    except DataError:
        raise
    except Exception as error:  # of an archive, of what packs it and of arrays: a dozen kinds
        raise DataError(
            f"{path} cannot be read as {kind.name} ({error}): it needs {', '.join(keys)}"
        ) from error
    per_class = tuple(round(len(labels) / len(names)) for labels in (y_train, y_test))
    label = kind.name
    if per_class != kind.per_class:
        label += f" ({per_class[0]}+{per_class[1]} per class)"

    def split(part: str, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> ImageSet:
        return from_arrays(
            f"{label} {part}", images, labels, names.tolist(), licence=_LICENCE, source=_SOURCE
        )

    return Splits(split("train", x_train, y_train), split("test", x_test, y_test))
