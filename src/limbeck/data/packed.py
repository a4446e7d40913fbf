"""Files that may be packed, read with a bound: a few bytes may unpack to more than a memory holds."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path

from limbeck.errors import DataError

MOST = 100
"""Times its own size that a file may unpack to; texts come to ten times theirs."""
FREE = 64 * 2**20
"""Bytes up to which nothing is said."""


def content(path: Path) -> bytes:
    """The bytes of a file, unpacked where its name ends in ``.gz``.

    Raises:
        DataError: it is no file, is damaged, or unpacks to far more than it is.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file: name one that is")
    if path.suffix != ".gz":
        return path.read_bytes()
    allowed = max(FREE, MOST * path.stat().st_size)
    try:
        with gzip.open(path) as packed:
            raw = packed.read(allowed + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged ({error}): get the file again") from error
    if len(raw) > allowed:
        raise _bomb(path)
    return raw


def check_archive(path: Path) -> None:
    """Raise unless a zip archive unpacks to about what one expects of its size.

    Raises:
        DataError: it does not.
        OSError: it cannot be read.
        zipfile.BadZipFile: it is none.
    """
    with zipfile.ZipFile(path) as archive:
        whole = sum(member.file_size for member in archive.infolist())
    if whole > max(FREE, MOST * path.stat().st_size):
        raise _bomb(path)


def _bomb(path: Path) -> DataError:
    return DataError(f"{path} unpacks to more than {MOST} times its size: unpack it yourself if you trust it")
