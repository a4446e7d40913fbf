"""What frozen networks said, kept on disk: query features and teacher outputs by sample and view.

A cache is filled in one pass in a fixed order, so that its content depends on its key alone. The key
holds everything that the content depends on (weights, data, transform, samples, views, type); it names
the folder and is checked against the header inside. Values are plain arrays in memory maps.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from limbeck.engine.state import file_hash, reason, value_hash, write_json
from limbeck.errors import CacheError, LimbeckError
from limbeck.plain import from_json

Rows = Mapping[str, Tensor]
IN_MEMORY_BYTES = 512 * 2**20
FLUSH_SECONDS = 10.0
HEADER = ("key", "shapes", "rows", "complete", "sha256")


class Cache:
    """Rows of named tensors for ``samples`` x ``views``.

    Args:
        root: folder that holds caches.
        key: plain data that names everything the rows depend on.
        index: the data-set positions [N] that have rows; others are refused.
        views: number of replayed views of each sample.
        dtype: storage type of floating rows.
    """

    def __init__(
        self, root: Path, key: dict[str, Any], index: Tensor, views: int, dtype: torch.dtype = torch.float32
    ) -> None:
        named = {**key, "samples": value_hash(index.tolist()), "views": views, "dtype": str(dtype)}
        self.key = json.loads(json.dumps(named))  # as the header will hold it
        self.folder = root / value_hash(self.key)
        self.index, self.views, self.dtype = index, views, dtype
        self.position = torch.full((int(index.max()) + 1,), -1, dtype=torch.int64)
        self.position[index] = torch.arange(len(index))
        self.rows: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.index) * self.views

    @property
    def complete(self) -> bool:
        """Whether all rows are on disk."""
        header = self._header()
        return header is not None and header["complete"]

    def fill(self, chunks: Callable[[int], Iterator[Rows]]) -> None:
        """Make sure that all rows are there.

        Args:
            chunks: given the first missing row, yields the rows from there on, in order of
                (view, position in ``index``). Called only if something is missing.

        Raises:
            CacheError: the files were altered, or belong to another key, or cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be filling it just now
                header = self._header()
                if header is None or not header["complete"]:
                    self._write(chunks, 0 if header is None else header["rows"], header)
                self._open()
        except OSError as error:
            raise CacheError(f"cannot write cache {self.folder}: {reason(error)}") from error

    def __call__(self, index: Tensor, view: Tensor) -> dict[str, Tensor]:
        """The rows of samples ``index`` [B] in views ``view`` [B], each [B, ...] in float32.

        Raises:
            CacheError: a sample that was never captured.
        """
        place = self.position[index]
        if int(place.min()) < 0:
            missing = int(index[place.argmin()])
            raise CacheError(f"cache {self.folder} has no row for sample {missing}: it is of other samples")
        at = view * len(self.index) + place
        found = {name: rows[at] for name, rows in self.rows.items()}
        return {name: rows.float() if rows.is_floating_point() else rows for name, rows in found.items()}

    def delete(self) -> None:
        """Remove the files."""
        self.rows = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def _header(self) -> dict[str, Any] | None:
        path = self.folder / "header.json"
        if not path.exists():
            return None
        try:
            header: dict[str, Any] = from_json(path.read_text(encoding="utf-8"))
            key, *_ = (header[field] for field in HEADER)
        except (ValueError, TypeError, KeyError) as error:
            raise CacheError(f"cache header {path} is damaged: delete the folder {self.folder}") from error
        if key != self.key:
            raise CacheError(f"cache {self.folder} was made from something else: delete that folder")
        return header

    def _write(
        self, chunks: Callable[[int], Iterator[Rows]], start: int, header: dict[str, Any] | None
    ) -> None:
        """Append the rows from ``start`` on, by plain writes: a full disk is then an error, not a signal."""
        shapes: dict[str, tuple[list[int], str]] = dict(header["shapes"]) if header else {}
        row, flushed = start, time.monotonic()
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(self._reopen(name, start * row_bytes(*form)))
                for name, form in shapes.items()
            }
            try:
                for chunk in chunks(start):
                    for name, values in chunk.items():
                        stored = values.detach().cpu().contiguous()
                        stored = stored.to(self.dtype) if stored.is_floating_point() else stored
                        if name not in files:
                            shapes[name] = (list(stored.shape[1:]), str(stored.numpy().dtype))
                            files[name] = stack.enter_context(self._path(name).open("wb"))
                        files[name].write(stored.numpy().data)
                    row += len(next(iter(chunk.values())))
                    if time.monotonic() - flushed > FLUSH_SECONDS:
                        self._flush(files, shapes, row, complete=False)
                        flushed = time.monotonic()
            except LimbeckError:  # of what is asked: what it has said is kept
                self._flush(files, shapes, row, complete=False)
                raise
            self._flush(files, shapes, row, complete=True)

    def _reopen(self, name: str, size: int) -> IO[bytes]:
        """The file of an unfinished cache, cut to the ``size`` that its header vouches for."""
        path = self._path(name)
        if not path.exists() or path.stat().st_size < size:
            raise self._damaged(path)
        os.truncate(path, size)
        return path.open("ab")

    def _flush(
        self, files: Mapping[str, IO[bytes]], shapes: dict[str, Any], rows: int, *, complete: bool
    ) -> None:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        sums = {name: file_hash(self._path(name)) for name in files} if complete else {}
        header = {"key": self.key, "shapes": shapes, "rows": rows, "complete": complete, "sha256": sums}
        write_json(self.folder / "header.json", header)

    def _open(self) -> None:
        header = self._header()
        assert header is not None
        for name, (shape, kind) in header["shapes"].items():
            path = self._path(name)
            if not path.exists() or file_hash(path) != header["sha256"][name]:
                raise self._damaged(path)
            values = np.memmap(path, dtype=np.dtype(kind), mode="c", shape=(self.count, *shape))
            self.rows[name] = torch.from_numpy(values.copy() if values.nbytes < IN_MEMORY_BYTES else values)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _damaged(self, path: Path) -> CacheError:
        return CacheError(f"cache file {path} is damaged: delete the folder {self.folder}, run again")


def row_bytes(shape: list[int], kind: str) -> int:
    """Bytes of one row of ``shape`` and numpy type ``kind``."""
    return math.prod(shape) * np.dtype(kind).itemsize
