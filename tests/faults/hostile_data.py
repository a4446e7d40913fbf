"""Hostile data: damaged images, arrays, tables and texts, bombs, odd names, circles of links."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tests.faults.hostile import WORDS, Case, mutated, mutated_text, odd_value, pickled

from limbeck import config, registry

FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "bmp": "BMP",
    "gif": "GIF",
    "ppm": "PPM",
    "tif": "TIFF",
    "webp": "WEBP",
}
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I", "F", "I;16", "YCbCr", "HSV", "PA")
BOMB = 2**28  # zeros that a small file unpacks to


def read(name: str, **fields: Any) -> Callable[[], None]:
    """Load a data set and read all of it, as a run does."""

    def run() -> None:
        given = json.loads(json.dumps(fields))
        splits = config.make(registry.get("data", name), given, "data").load()
        for part in (splits.train, splits.test):
            if hasattr(part, "images"):
                part.read(np.arange(len(part)))

    return run


def fresh(folder: Path) -> Path:
    """An empty folder; what was there before is gone."""
    place = folder / "data"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


# Images


def picture(random: Random, kind: str) -> bytes:
    """A small picture of a random mode, as a file of that kind."""
    buffer = io.BytesIO()
    image = Image.new(random.choice(MODES), (random.choice((1, 2, 9, 31)), random.choice((1, 3, 8))))
    try:
        image.save(buffer, FORMATS[kind])
    except (OSError, ValueError):  # a mode that the kind does not have
        Image.new("RGB", image.size).save(buffer, FORMATS[kind])
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """A piece of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def giant(random: Random) -> bytes:
    """A PNG that says it is huge."""
    width, height = (random.choice((1, 2**15, 2**16, 2**20, 2**31 - 1)) for _ in range(2))
    head = struct.pack(
        ">IIBBBBB", width, height, random.choice((1, 8, 16)), random.choice((0, 2, 3, 6)), 0, 0, 0
    )
    body = zlib.compress(bytes(random.choice((0, 10, 10**6))))
    more = chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(10**7))) if random.random() < 0.3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def damaged(random: Random) -> bytes:
    """What lies where an image should."""
    kind = random.choice(tuple(FORMATS))
    return random.choice(
        (
            lambda: mutated(random, picture(random, kind)),
            lambda: mutated(random, picture(random, kind)),
            lambda: giant(random),
            lambda: b"",
            lambda: random.randbytes(99),
            pickled,
            lambda: b"P6 99999 99999 255\n" + bytes(99),
            lambda: b"BM" + random.randbytes(80),
            lambda: b"GIF89a\xff\xff\xff\xff" + random.randbytes(50),
            lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run",
            lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
        )
    )()


def image_folders(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Folders of classes with one odd thing in each."""
    for _ in range(count):
        root = fresh(folder)
        split = random.random() < 0.5
        for part in ("train", "test") if split else (".",):
            for name in (
                "cat",
                random.choice(("dog", "d" * 200, "\u202egod", "a\nb", "<b>", "..x", "\\x", "-")),
            ):
                (root / part / name).mkdir(parents=True, exist_ok=True)
                for number in range(1 if split else 5):
                    kind = random.choice(tuple(FORMATS))
                    (root / part / name / f"{number}.{kind}").write_bytes(picture(random, kind))
        files = sorted(path for path in root.rglob("*") if path.is_file())
        target = random.choice(files)
        said = spoilt(random, root, target)
        fields: dict[str, Any] = {"root": str(root), "side": random.choice((8, 8, 8, 0, -1, 1))}
        if random.random() < 0.1:
            fields[random.choice(("label", "test_fraction", "split_seed", "root", "side"))] = odd_value(
                random
            )
        if fields["side"] in range(65):
            yield Case(f"folder {fields}: {said} at {target.relative_to(root)}", read("folder", **fields))


def spoilt(random: Random, root: Path, target: Path) -> str:
    """Spoil one file of an image folder; what was done."""
    pick = random.random()
    if pick < 0.7:
        raw = damaged(random)
        target.write_bytes(raw)
        return f"{raw[:60]!r}"
    target.unlink()
    if pick < 0.75:
        target.symlink_to(target)
    elif pick < 0.8:
        target.symlink_to("/dev/zero" if random.random() < 0.5 else "/nowhere")
    elif pick < 0.85:
        target.mkdir()
    elif pick < 0.9:
        (target.parent / "loop").symlink_to(root)
    elif pick < 0.95:
        os.mkfifo(target)
    else:
        shutil.rmtree(target.parent)
        target.parent.symlink_to(target.parent)
    return "a link, a folder, a pipe or nothing"


# Arrays


def idx(*shape: int) -> bytes:
    """An idx file of unsigned bytes."""
    values = np.arange(int(np.prod(shape)), dtype=np.uint64) % 10
    return (
        struct.pack(">BBBB", 0, 0, 8, len(shape))
        + struct.pack(f">{len(shape)}I", *shape)
        + values.astype("u1").tobytes()
    )


def idx_files(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """The four files of Fashion-MNIST, one of them damaged."""
    whole = {
        f"{part}-{what}": idx(*shape)
        for part in ("train", "t10k")
        for what, shape in (("images-idx3-ubyte", (20, 28, 28)), ("labels-idx1-ubyte", (20,)))
    }
    for _ in range(count):
        root, name = fresh(folder), random.choice(tuple(whole))
        changed = whole[name]
        match random.randrange(5):
            case 0:
                sizes = [
                    random.choice((0, 1, 2, 20, 28, 2**16, 2**31, 2**32 - 1))
                    for _ in range(random.randrange(5))
                ]
                changed = struct.pack(">BBBB", 0, 0, 8, random.choice((len(sizes), 3, 255)))
                changed += struct.pack(f">{len(sizes)}I", *sizes) + bytes(99)
            case 1:
                changed = b""
            case _:
                changed = mutated(random, changed)
        packed = random.random() < 0.4
        for each, raw in {**whole, name: changed}.items():
            hidden = gzip.compress(raw) if packed else raw
            hidden = mutated(random, hidden) if packed and each == name and random.random() < 0.5 else hidden
            if packed and each == name and random.random() < 0.05:
                hidden = gzip.compress(raw[:16] + bytes(BOMB), 1)
            (root / (each + (".gz" if packed else ""))).write_bytes(hidden)
        yield Case(f"idx {name} {packed}: {changed[:60]!r}", read("fashion_mnist", root=str(root)))


def arrays() -> dict[str, Any]:
    """The arrays of a CIFAR-10 file."""
    return {
        "x_train": np.zeros((20, 32, 32, 3), np.uint8),
        "y_train": np.arange(20) % 10,
        "x_test": np.zeros((10, 32, 32, 3), np.uint8),
        "y_test": np.arange(10),
        "names": np.array([f"c{i}" for i in range(10)]),
        "fine_names": np.array([f"c{i}" for i in range(10)]),
    }


def odd_array(random: Random, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array of another kind in the place of ``values``."""
    found: npt.NDArray[Any] = random.choice(
        (
            lambda: values[:0],
            lambda: np.zeros(20, np.float32),
            lambda: values.astype(object),
            lambda: values.astype("S9"),
            lambda: values[None],
            lambda: np.array(3),
            lambda: values[1:],
            lambda: np.full((10, 32, 32, 3), np.nan),
            lambda: np.full(10, -1),
            lambda: np.full(10, 2**40),
            lambda: np.zeros((20, 32, 32, 3), "c16"),
            lambda: np.zeros(10, "datetime64[s]"),
            lambda: np.zeros(10, [("a", "i4")]),
            lambda: np.array(["\u202e\n", "<b>"] * 5),
            lambda: values,
            lambda: np.arange(20, dtype=np.uint64),
            lambda: np.ones(10, bool),
        )
    )()
    return found


def npz_files(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """``.npz`` files with other arrays, damaged members, pickles and bombs."""
    for _ in range(count):
        given, key = arrays(), random.choice(("x_train", "y_train", "x_test", "y_test", "names"))
        root = fresh(folder)
        file = root / "cifar10.npz"
        given[key] = odd_array(random, given[key])
        np.savez(file, **given)
        pick = random.random()
        if pick < 0.4:
            file.write_bytes(mutated(random, file.read_bytes()))
        elif pick < 0.6:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
                for name, values in arrays().items():
                    packed.writestr(f"{name}.npy", member(random, values) if name == key else npy(values))
        elif pick < 0.65:
            file.write_bytes(pickled())
        fields = {"root": str(root if random.random() < 0.8 else file)}
        yield Case(f"npz {key} {given[key].dtype} {given[key].shape}", read("cifar10", **fields))


def npy(values: Any) -> bytes:
    """An array as a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def member(random: Random, values: Any) -> bytes:
    """A ``.npy`` file that is none, or that lies."""
    shape = random.choice(("(20,)", "(99999999999,)", "(-1,)", "(2**60,)", "__import__('os')", "(10, 10**9)"))
    kind = random.choice(("'|u1'", "'|O'", "'<f8'", "__import__('os').system('x')", "'<U99999999'"))
    head = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    lying = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head
    return random.choice(
        (lying + bytes(99), lying + pickled(), pickled(), mutated(random, npy(values)), lying)
    )


def cifar_binaries(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """The binary version of CIFAR-10 with damaged records or names."""
    for _ in range(count):
        root = fresh(folder)
        inner = root / "cifar-10-batches-bin"
        inner.mkdir()
        files = {f"data_batch_{i}.bin": bytes([i % 10, *bytes(3072)]) * 2 for i in range(1, 6)}
        files |= {
            "test_batch.bin": bytes(3073) * 3,
            "batches.meta.txt": b"\n".join(b"c%d" % i for i in range(10)),
        }
        target = random.choice(tuple(files))
        files[target] = random.choice(
            (mutated(random, files[target]), b"", pickled(), random.randbytes(3073))
        )
        if random.random() < 0.1:
            del files[target]
        for name, raw in files.items():
            (inner / name).write_bytes(raw)
        yield Case(f"cifar binary {target}: {files.get(target, b'')[:40]!r}", read("cifar10", root=str(root)))


# Texts


def packed(random: Random, raw: bytes, name: str, root: Path) -> str:
    """Write ``raw``, maybe as a damaged ``.gz`` or a bomb; the file's name."""
    pick = random.random()
    if pick < 0.6:
        (root / name).write_bytes(raw)
        return name
    if pick < 0.62:
        hidden = gzip.compress(raw + bytes(BOMB), 1)
    elif pick < 0.8:
        hidden = mutated(random, gzip.compress(raw))
    else:
        hidden = gzip.compress(raw) if pick < 0.9 else raw
    (root / f"{name}.gz").write_bytes(hidden)
    return f"{name}.gz"


def encoded(random: Random, text: str) -> bytes:
    """``text`` in UTF-8 or in something else."""
    name = random.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32", "cp037"))
    raw = text.encode(name, "surrogatepass" if name.startswith("utf") else "replace")
    return mutated(random, raw) if random.random() < 0.4 else raw


def jsonl_files(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Lines of JSON with other types, depth, numbers and encodings."""
    for _ in range(count):
        root = fresh(folder)
        lines = [
            json.dumps({"text": f"line {i} says so", "prompt": "Q", "split": "train"}) for i in range(40)
        ]
        odd = random.choice(
            (
                lambda: json.dumps(odd_value(random)),
                lambda: json.dumps({"text": odd_value(random)}),
                lambda: "[" * 99999,
                lambda: '{"text": ' + "9" * 9999 + "}",
                lambda: '{"text": "\\ud800"}',
                lambda: '{"text": NaN}',
                lambda: '{"text": "a", "text": "b"}',
                lambda: json.dumps({"text": "x" * 10**5}),
                lambda: "\x00",
                lambda: "{",
                lambda: json.dumps({"text": random.choice(WORDS), "split": random.choice(WORDS)}),
                lambda line=lines[0]: mutated_text(random, line),
                lambda: '{"text": ""}',
                lambda: '{"a":' * 9999 + "1" + "}" * 9999,
            )
        )()
        lines[random.randrange(len(lines))] = odd
        file = packed(
            random, encoded(random, "\n".join(lines)), random.choice(("a.jsonl", "\u202eb.jsonl")), root
        )
        fields: dict[str, Any] = {"files": [file], "root": str(root)}
        fields |= random.choice(({}, {"prompt": "prompt"}, {"split": "split"}, {"limit": 3}))
        if random.random() < 0.15:
            fields[random.choice(("text", "limit", "validation", "test", "files", "length", "tokenizer"))] = (
                odd_value(random)
            )
        yield Case(f"jsonl {fields}: {odd[:80]!r}", read_rows("jsonl", fields))


def text_files(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Texts in other encodings, without an end, with odd letters."""
    for _ in range(count):
        root = fresh(folder)
        text = mutated_text(random, "A line of text that goes on.\n" * 50) * random.choice((1, 1, 50))
        text += random.choice(WORDS) + random.choice(("", "\x00" * 99, "\ufeff", "\u2028", "e\u0301" * 500))
        file = packed(random, encoded(random, text), "a.txt", root)
        fields: dict[str, Any] = {"files": [file], "root": str(root)}
        if random.random() < 0.3:
            wrong = random.choice(
                ("separator", "characters", "validation", "test", "test_files", "length", "private", "root")
            )
            fields[wrong] = odd_value(random)
        yield Case(f"text {fields}: {text[:80]!r}", read_rows("text_files", fields))


def read_rows(name: str, fields: Mapping[str, Any]) -> Callable[[], None]:
    """Load texts and make rows of tokens of them, as a run does."""

    def run() -> None:
        from limbeck.data.tokenizers import tokenizer_of
        from limbeck.data.tokens import rows_of

        data = config.make(registry.get("data", name), fields, "data")
        splits = data.load()
        tokenizer = tokenizer_of("characters", splits.train)
        for part in (splits.train, splits.validation, splits.test):
            rows_of(part, tokenizer, data.reading)

    return run


KINDS = {
    "image folders": (7, image_folders),
    "idx files": (9, idx_files),
    "npz files": (9, npz_files),
    "CIFAR binaries": (5, cifar_binaries),
    "JSON lines": (4, jsonl_files),
    "texts": (3, text_files),
}
