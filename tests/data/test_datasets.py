from __future__ import annotations

import gzip
import os
import sys
import unicodedata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from limbeck.data import roots as roots_module
from limbeck.data.cifar10 import CIFAR10
from limbeck.data.cifar100 import CIFAR100
from limbeck.data.digits import Digits
from limbeck.data.fashion_mnist import FashionMNIST
from limbeck.data.folder import Folder
from limbeck.data.glyphs import TEST_STYLES, TRAIN_STYLES, Glyphs
from limbeck.data.huggingface import HuggingFace
from limbeck.data.imagenet_r import ImageNetR
from limbeck.data.images import Splits
from limbeck.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Digits


def test_digits_are_all_there_and_split_once_for_all_seeds() -> None:
    splits = Digits().load()
    assert (len(splits.train), len(splits.test)) == (1347, 450)
    assert splits.name == "digits"
    assert splits.train.images.shape[1:] == (8, 8, 1)
    pixels = splits.train.read(np.arange(1347))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert splits.train.fingerprint == Digits().load().train.fingerprint
    assert splits.train.fingerprint != Digits(split_seed=1).load().train.fingerprint
    together = {row.tobytes() for row in pixels} & {row.tobytes() for row in splits.test.read(np.arange(450))}
    assert not together


# Fashion-MNIST


def write_idx(path: Path, array: np.ndarray, packed: bool) -> None:
    raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.with_name(path.name + ".gz") if packed else path).write_bytes(gzip.compress(raw) if packed else raw)


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw", "fashion-mnist"])
@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_reads_idx_files(tmp_path: Path, place: str, packed: bool) -> None:
    arrays = {}
    for prefix, count in (("train", 20), ("t10k", 10)):
        arrays[prefix] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / place / f"{prefix}-images-idx3-ubyte", arrays[prefix], packed)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(tmp_path / place / f"{prefix}-labels-idx1-ubyte", labels, packed)
    splits = FashionMNIST(root=str(tmp_path)).load()
    assert np.array_equal(splits.train.read(np.arange(20))[..., 0], arrays["train"])
    assert np.array_equal(splits.test.read(np.arange(10))[..., 0], arrays["t10k"])
    assert splits.train.labels.tolist() == [*range(10), *range(10)]
    assert splits.train.classes[9] == "ankle boot"


def test_fashion_mnist_that_is_damaged_or_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError) as missing:
        FashionMNIST(root=str(tmp_path)).load()
    text = one_line(missing)
    assert "apt-get install dataset-fashion-mnist" in text
    assert "LIMBECK_DATA" in text
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="is damaged"):
        FashionMNIST(root=str(tmp_path)).load()
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 28, 28), np.uint8), packed=True)
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\[\.gz\] is not in"):
        FashionMNIST(root=str(tmp_path)).load()


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(),
    reason="Debian's dataset-fashion-mnist is not installed",
)
def test_fashion_mnist_of_debian_is_whole() -> None:
    splits = FashionMNIST().load()
    assert (len(splits.train), len(splits.test)) == (60000, 10000)
    assert splits.train.labels.bincount().tolist() == [6000] * 10


# CIFAR-100


def cifar_arrays(per_class: int = 2) -> dict[str, np.ndarray]:
    count = 100 * per_class
    return {
        "x_train": RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(count) % 100,
        "x_test": RNG.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8),
        "y_test": np.arange(100),
        "fine_names": np.array([f"name{c}" for c in range(100)]),
    }


def test_cifar100_npz_names_its_size(tmp_path: Path) -> None:
    arrays = cifar_arrays()
    np.savez(tmp_path / "few.npz", **arrays)
    for how in (CIFAR100(root=str(tmp_path), file="few.npz"), CIFAR100(root=str(tmp_path / "few.npz"))):
        splits = how.load()
        assert splits.name == "CIFAR-100 (2+1 per class)"
        assert np.array_equal(splits.train.read(np.arange(200)), arrays["x_train"])
        assert splits.train.classes[99] == "name99"


def test_cifar100_binary_version(tmp_path: Path) -> None:
    arrays, folder = cifar_arrays(), tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("\n".join(arrays["fine_names"]) + "\n")
    for part in ("train", "test"):
        labels = arrays[f"y_{part}"].astype(np.uint8)[:, None]
        planes = arrays[f"x_{part}"].transpose(0, 3, 1, 2).reshape(len(labels), -1)
        np.concatenate([labels // 5, labels, planes], axis=1).tofile(folder / f"{part}.bin")
    splits = CIFAR100(root=str(tmp_path)).load()
    assert np.array_equal(splits.train.read(np.arange(200)), arrays["x_train"])
    assert splits.test.labels.tolist() == list(range(100))
    (folder / "test.bin").write_bytes(b"12345")
    with pytest.raises(DataError, match="5 bytes, no multiple of 3074"):
        CIFAR100(root=str(tmp_path)).load()


def test_cifar100_never_opens_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(DataError) as caught:
        CIFAR100(root=str(tmp_path)).load()
    assert "is a pickle" in one_line(caught)
    np.savez(tmp_path / "evil.npz", **{**cifar_arrays(), "fine_names": np.array([{}], dtype=object)})
    with pytest.raises(DataError, match="cannot be read as CIFAR-100"):
        CIFAR100(root=str(tmp_path), file="evil.npz").load()


def test_cifar100_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'no\.npz' \(data\.file\) is not on this machine"):
        CIFAR100(root=str(tmp_path), file="no.npz").load()


# CIFAR-10


def cifar10_arrays() -> dict[str, np.ndarray]:
    return {
        "x_train": RNG.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8),
        "y_train": RNG.permutation(50) % 10,
        "x_test": RNG.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8),
        "y_test": np.arange(10),
        "names": np.array([f"name{c}" for c in range(10)]),
    }


def write_cifar10(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """The binary version: five files of ten images, and the test split."""
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(arrays["names"]) + "\n\n")
    planes = {part: arrays[f"x_{part}"].transpose(0, 3, 1, 2) for part in ("train", "test")}
    files = {f"data_batch_{n + 1}": ("train", slice(10 * n, 10 * n + 10)) for n in range(5)}
    for name, (part, rows) in (files | {"test_batch": ("test", slice(0, 10))}).items():
        labels = arrays[f"y_{part}"][rows].astype(np.uint8)[:, None]
        np.concatenate([labels, planes[part][rows].reshape(10, -1)], 1).tofile(folder / f"{name}.bin")


def test_cifar10_binary_version_and_npz_are_the_same_set(tmp_path: Path) -> None:
    arrays, folder = cifar10_arrays(), tmp_path / "cifar-10-batches-bin"
    write_cifar10(folder, arrays)
    np.savez(tmp_path / "few.npz", **arrays)
    binary, packed = CIFAR10(root=str(tmp_path)).load(), CIFAR10(root=str(tmp_path / "few.npz")).load()
    assert np.array_equal(binary.train.read(np.arange(50)), arrays["x_train"])
    assert binary.train.labels.tolist() == arrays["y_train"].tolist()
    assert binary.train.fingerprint == packed.train.fingerprint
    assert (binary.name, packed.name) == ("CIFAR-10", "CIFAR-10 (5+1 per class)")
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_4\.bin is not there but files beside it are"):
        CIFAR10(root=str(tmp_path)).load()


def test_cifar10_class_folders(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_folder(tmp_path / "CIFAR-10-dataset" / part, ["airplane", "truck"])
    splits = CIFAR10(root=str(tmp_path)).load()
    assert splits.name == "CIFAR-10"
    assert splits.train.images.shape == (10, 32, 32, 3)
    with pytest.raises(DataError, match=r"CIFAR-10 is not on this machine: .*cifar-10-batches-bin/.*162 MB"):
        CIFAR10(root=str(tmp_path / "CIFAR-10-dataset" / "test")).load()


# Image folders


def write_folder(root: Path, classes: list[str], count: int = 5) -> None:
    for place, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((20, 30, 3), 40 * place + number, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def test_folder_without_split(tmp_path: Path) -> None:
    write_folder(tmp_path, ["cat", "ant", "bee"])
    splits = Folder(root=str(tmp_path), side=16).load()
    assert splits.train.classes == ("ant", "bee", "cat")
    assert (len(splits.train), len(splits.test)) == (12, 3)
    assert splits.train.images.shape == (12, 16, 16, 3)
    assert splits.train.lazy
    values = splits.train.read(np.arange(12))[:, 8, 8, 0]
    first = {"cat": 0, "ant": 40, "bee": 80}
    for value, label in zip(values.tolist(), splits.train.labels.tolist(), strict=True):
        assert 0 <= value - first[splits.train.classes[label]] < 5


def test_folder_with_splits_and_fingerprint(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_folder(tmp_path / place / "train", ["x", "y"])
        write_folder(tmp_path / place / "val", ["x", "y"], count=2)
    one, other = (Folder(root=str(tmp_path / place), label="f").load() for place in ("a", "b"))
    assert (len(one.train), len(one.test)) == (10, 4)
    assert one.train.fingerprint == other.train.fingerprint
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "b" / "train" / "x" / "0.png")
    Image.fromarray(np.zeros((20, 31, 3), np.uint8)).save(tmp_path / "b" / "train" / "y" / "1.png")
    assert Folder(root=str(tmp_path / "b"), label="f").load().train.fingerprint != one.train.fingerprint


def test_folder_reads_the_middle_square(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    splits = Folder(root=str(tmp_path), side=5, test_fraction=0.5).load()
    assert (splits.train.read(np.arange(2)) == 200).all()


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root is not given"):
        Folder().load()
    with pytest.raises(DataError, match="which is not there"):
        Folder(root=str(tmp_path / "none")).load()
    with pytest.raises(DataError, match="no sub-folders"):
        Folder(root=str(tmp_path)).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        Folder(root=str(tmp_path)).load()
    with pytest.raises(ConfigError, match=r"data\.side is 0"):
        Folder(root=str(tmp_path), side=0).load()


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, ["x", "y"])
    splits = Folder(root=str(tmp_path), side=8).load()
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:45])
    with pytest.raises(DataError, match=r"\.png cannot be read as an image"):
        splits.train.read(np.arange(1))


@pytest.mark.parametrize("inside", ["imagenet-r", "."])
def test_imagenet_r_layout(tmp_path: Path, inside: str) -> None:
    names = ["n01443537", *(f"n{number:08d}" for number in range(199))]
    root = tmp_path / inside
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(5):
            (root / name / f"{number}.jpg").write_bytes(b"not read here")
    splits = ImageNetR(root=str(tmp_path)).load()
    assert (len(splits.train), len(splits.test)) == (800, 200)
    assert len(splits.train.classes) == 200
    assert splits.test.labels.bincount().tolist() == [1] * 200


def test_imagenet_r_missing_or_cut(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        ImageNetR(root=str(tmp_path)).load()
    assert "imagenet-r.tar" in one_line(caught)
    write_folder(tmp_path, ["n01443537", "n01484850"])
    with pytest.raises(DataError, match="has 2 class folders but ImageNet-R has 200"):
        ImageNetR(root=str(tmp_path)).load()


# Hugging Face


class Table:
    """What is used of a ``datasets`` table."""

    def __init__(self, count: int, labels: list[Any]) -> None:
        self.column_names = ["img", "y"]
        self.features = {"y": SimpleNamespace(names=["no", "yes"]), "img": None}
        self.info = SimpleNamespace(license="mit")
        self._fingerprint = f"f{count}"
        self.rows = [
            {"img": Image.new("RGB", (8, 6), (i, i, i)), "y": label} for i, label in enumerate(labels)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Table]:
    tables = {"train": Table(4, [0, 1, 0, 1]), "validation": Table(2, [0, 1])}

    def load_dataset(path: str, config: str | None) -> dict[str, Table]:
        if path != "some/set":
            raise ConnectionError("Couldn't reach 'x' on the Hub\nlong story")
        return tables

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return tables


def test_hub_columns_and_splits_by_name(hub: dict[str, Table]) -> None:
    how = HuggingFace(path="some/set", test="validation", image="img", label="y", side=6)
    splits = how.load()
    assert splits.train.classes == ("no", "yes")
    assert splits.train.labels.tolist() == [0, 1, 0, 1]
    assert splits.train.read(np.array([3, 1]))[:, 0, 0, 0].tolist() == [3, 1]
    assert splits.train.licence == "mit"
    assert splits.train.fingerprint == "f4-6"


def test_hub_mistakes(hub: dict[str, Table]) -> None:
    with pytest.raises(ConfigError, match=r"unknown split 'test' at data\.test.*validation"):
        HuggingFace(path="some/set", image="img", label="y").load()
    with pytest.raises(ConfigError, match=r"unknown column 'image' at data\.image: .*img"):
        HuggingFace(path="some/set", test="validation", label="y").load()
    with pytest.raises(DataError) as caught:
        HuggingFace(path="other/set").load()
    assert "Couldn't reach" in one_line(caught)
    hub["train"] = Table(2, ["a", "b"])
    with pytest.raises(DataError, match="not class numbers"):
        HuggingFace(path="some/set", test="validation", image="img", label="y").load()


def test_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'limbeck\[language\]'"):
        HuggingFace(path="some/set").load()


# Glyphs


@pytest.fixture(scope="module")
def glyphs() -> Splits:
    return Glyphs().load()


def test_glyphs_are_many_and_each_class_is_in_both_splits(glyphs: Splits) -> None:
    classes = len(glyphs.train.classes)
    assert classes > 400
    assert glyphs.train.labels.bincount(minlength=classes).min() >= 10
    assert glyphs.test.labels.bincount().tolist() == [len(TEST_STYLES)] * classes
    assert not set(TRAIN_STYLES) & set(TEST_STYLES)
    assert glyphs.train.images.shape[1:] == (40, 40, 1)


def test_glyphs_hold_neither_digits_nor_what_looks_like_one(glyphs: Splits) -> None:
    characters = [name[0] for name in glyphs.train.classes]
    assert len(set(characters)) == len(characters)
    assert not [char for char in characters if unicodedata.category(char) in ("Nd", "Nl", "No")]
    assert not set(characters) & set("oOIlSBZgqbОЗзƧ")


def test_glyphs_are_bright_on_dark_and_fill_the_frame(glyphs: Splits) -> None:
    pixels = glyphs.train.read(np.arange(len(glyphs.train)))[..., 0]
    assert pixels[:, 0].max() == pixels[:, -1].max() == pixels[:, :, 0].max() == 0
    assert (pixels.max(axis=(1, 2)) > 100).all()
    inked = pixels > 0
    rows, columns = inked.any(axis=2), inked.any(axis=1)
    extent = np.maximum(_span(rows), _span(columns))
    assert extent.max() == 32
    assert extent.min() >= 30  # the faint ends of a stroke may round to 0


def _span(lines: np.ndarray) -> np.ndarray:
    return lines.shape[1] - lines.argmax(axis=1) - lines[:, ::-1].argmax(axis=1)


def test_glyphs_are_the_same_each_time(glyphs: Splits) -> None:
    assert Glyphs().load().test.fingerprint == glyphs.test.fingerprint


# Roots


def test_roots_come_from_the_field_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert roots_module.roots(None) == []
    monkeypatch.setenv("LIMBECK_DATA", os.pathsep.join([str(tmp_path), str(tmp_path.parent)]))
    assert roots_module.roots(None) == [tmp_path, tmp_path.parent]
    assert roots_module.roots(str(tmp_path.parent)) == [tmp_path.parent]
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path / "no"))
    with pytest.raises(DataError, match="LIMBECK_DATA names"):
        roots_module.roots(None)


def test_fetch_keeps_only_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"hello")
    url, target = (tmp_path / "there").as_uri(), tmp_path / "deep" / "here"
    with pytest.raises(DataError, match="another file than expected"):
        roots_module.fetch(url, target, "0" * 32)
    assert list(target.parent.iterdir()) == []
    roots_module.fetch(url, target, "5d41402abc4b2a76b9719d911017c592")
    assert target.read_bytes() == b"hello"
    with pytest.raises(DataError, match="cannot download"):
        roots_module.fetch((tmp_path / "nowhere").as_uri(), tmp_path / "x", "0" * 32)


def test_sets_state_licence_and_source(glyphs: Splits) -> None:
    for splits in (Digits().load(), glyphs):
        for part in (splits.train, splits.test):
            assert part.licence
            assert part.source
