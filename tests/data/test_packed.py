"""Data files of strangers: what is damaged, huge once unpacked, or no file at all is refused by name."""

from __future__ import annotations

import gzip
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limbeck.data import packed
from limbeck.data.cifar10 import CIFAR10
from limbeck.data.files import Files
from limbeck.data.folder import Folder
from limbeck.data.jsonl import JsonLines
from limbeck.errors import DataError, LimbeckError


@pytest.fixture
def small_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "FREE", 1000)


def test_a_packed_file_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    assert packed.content(tmp_path / "a.txt.gz") == b"text"


def test_a_gzip_bomb_is_refused(tmp_path: Path, small_bound: None) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(DataError, match=r"a\.gz unpacks to more than 100 times its size: unpack it"):
        packed.content(tmp_path / "a.gz")


def test_a_zip_bomb_is_refused(tmp_path: Path, small_bound: None) -> None:
    with zipfile.ZipFile(tmp_path / "cifar10.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", bytes(10**6))
    with pytest.raises(DataError, match=r"cifar10\.npz unpacks to more than 100 times its size"):
        CIFAR10(root=str(tmp_path)).load()


def test_damaged_packing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text" * 99)[:-20])
    with pytest.raises(DataError, match="is damaged"):
        packed.content(tmp_path / "a.gz")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is no file"):
        packed.content(tmp_path / "a.txt")


@pytest.mark.parametrize("hidden", ["pickle", "bytes"])
def test_an_npz_of_something_else(tmp_path: Path, hidden: str) -> None:
    keys = ("x_train", "y_train", "x_test", "y_test", "names")
    with zipfile.ZipFile(tmp_path / "cifar10.npz", "w") as archive:
        for key in keys:
            buffer = io.BytesIO()
            np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
            archive.writestr(f"{key}.npy", buffer.getvalue() if hidden == "pickle" else b"x")
    with pytest.raises(DataError, match=r"cifar10\.npz"):
        CIFAR10(root=str(tmp_path)).load()


def folder_with(place: Path, name: str = "1.png") -> Path:
    """An image folder of two classes; the path where one more image of the first may stand."""
    for label in ("a", "b"):
        (place / label).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (4, 4)).save(place / label / f"x{number}.png")
    return place / "a" / name


def test_an_image_that_says_it_is_huge(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 2**16, 2**16, 8, 2, 0, 0, 0)
    file = tmp_path / "a.png"
    for width in (2**13 + 1, 2**16):
        head = struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0)
        body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        with pytest.raises(DataError, match=r"a\.png (has \d+ x \d+ pixels|cannot be read)"):
            Files((file,), 8).read(np.array([0]))


def test_what_another_program_would_run_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n"
    )
    with pytest.raises(DataError, match="cannot identify image file"):
        Files((tmp_path / "a.png",), 8).read(np.array([0]))


def test_a_pipe_and_a_circle_of_links_are_no_images(tmp_path: Path) -> None:
    for number, spoil in enumerate((os.mkfifo, lambda path: path.symlink_to(path))):
        odd = folder_with(tmp_path / str(number))
        spoil(odd)
        with pytest.raises(DataError, match=r"1\.png is no file"):
            Folder(root=str(odd.parents[1]), side=8).load()


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody/x"])
def test_a_root_that_no_file_system_takes(name: str) -> None:
    with pytest.raises(DataError, match=r"data\.root names"):
        Folder(root=name).load()


def test_lines_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 10**5)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no JSON"):
        JsonLines(files=(str(tmp_path / "a.jsonl"),)).load()


def test_a_message_is_one_line_that_a_terminal_can_show() -> None:
    said = str(LimbeckError("a\nb\u2028c \x1b[31md \u202ee é 😀"))
    assert said == "a b c \\x1b[31md \\u202ee é 😀"


@pytest.mark.parametrize(
    ("key", "values"),
    [("y_train", np.array(3)), ("names", np.array([])), ("x_test", np.zeros(10, "datetime64[s]"))],
)
def test_arrays_of_another_kind(tmp_path: Path, key: str, values: np.ndarray) -> None:
    images, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    given = {
        "x_train": images,
        "y_train": labels,
        "x_test": images,
        "y_test": labels,
        "names": labels.astype("U2"),
    }
    np.savez(tmp_path / "cifar10.npz", **{**given, key: values})
    with pytest.raises(DataError):
        CIFAR10(root=str(tmp_path)).load()
