"""CIFAR-100: small colour photographs."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.data import cifar_files
from limbeck.data.images import Dataset, Splits

_KIND = cifar_files.Kind(
    name="CIFAR-100",
    per_class=(500, 100),
    npz="cifar100.npz",
    names_key="fine_names",
    binary="cifar-100-binary",
    names_file="fine_label_names.txt",
    train=("train.bin",),
    test=("test.bin",),
    labels=2,
    first_class="apple",
    folders=("CIFAR-100-dataset", "cifar100", "CIFAR100"),
    archive="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    megabytes=161,
    pickled="cifar-100-python",
)


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
        return cifar_files.load(_KIND, self.root, self.file, self.download)
