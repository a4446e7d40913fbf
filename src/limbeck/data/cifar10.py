"""CIFAR-10: small colour photographs of ten classes."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.data import cifar_files
from limbeck.data.images import Dataset, Splits

_KIND = cifar_files.Kind(
    name="CIFAR-10",
    per_class=(5000, 1000),
    npz="cifar10.npz",
    names_key="names",
    binary="cifar-10-batches-bin",
    names_file="batches.meta.txt",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test=("test_batch.bin",),
    labels=1,
    first_class="airplane",
    folders=("CIFAR-10-dataset", "cifar10", "CIFAR10"),
    archive="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    megabytes=162,
    pickled="cifar-10-batches-py",
)


@dataclass(frozen=True, kw_only=True)
class CIFAR10(Dataset):
    """60,000 colour images of 32 x 32 pixels, 10 classes, 50,000 + 10,000 (Krizhevsky 2009).

    Read from the binary version (``cifar-10-batches-bin/``), from class folders (``train/<class>/*.png``,
    ``test/<class>/*.png``), or from an ``.npz`` file with the arrays x_train, y_train, x_test, y_test and
    names. The version made for Python (which torchvision keeps) is a pickle and is not read.

    Attributes:
        root: folder to look in, or the ``.npz`` file; None = LIMBECK_DATA.
        file: name of an ``.npz`` file in the root. A file with fewer images is named by its size, for
            example "CIFAR-10 (200+100 per class)".
        download: fetch the binary version (162 MB) from the author's server where none is found.
    """

    root: str | None = None
    file: str | None = None
    download: bool = False

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        return cifar_files.load(_KIND, self.root, self.file, self.download)
