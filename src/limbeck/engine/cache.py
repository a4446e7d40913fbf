"""What frozen networks said, kept on disk: query features and teacher outputs by sample and view.

A cache is filled in one pass in a fixed order, so that its content depends on its key alone. The key
holds everything that the content depends on (weights, data, transform, samples, views, type); it names
the folder and is checked against the header inside. Values are plain arrays in memory maps.
"""

from __future__ import annotations

import hashlib
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

from limbeck.engine.state import locked, read_sealed, reason, value_hash, write_sealed
from limbeck.errors import CacheError, CheckpointError, LimbeckError

Rows = Mapping[str, Tensor]
Sums = dict[str, "hashlib._Hash"]
IN_MEMORY_BYTES = 512 * 2**20
FLUSH_SECONDS = 10.0


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
        """Whether all rows are on disk, as their header says."""
        try:
            header = read_sealed(self.folder / "header.json")
        except (OSError, CheckpointError):
            return False
        return header["key"] == self.key and bool(header["complete"])

    def fill(self, chunks: Callable[[int], Iterator[Rows]], warn: Callable[[str], None]) -> None:
        """Make sure that all rows are there.

        Args:
            chunks: given the first missing row, yields the rows from there on, in order of
                (view, position in ``index``). Called only if something is missing.
            warn: told of a cache that was damaged, and is made anew.

        Raises:
            CacheError: the files cannot be written.
        """
        try:
            with locked(self.folder):  # another run may be filling it just now
                header, sums = self._kept(warn)
                if not header["complete"]:
                    header = self._write(chunks, header, sums)
                self._open(header)
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

    def _kept(self, warn: Callable[[str], None]) -> tuple[dict[str, Any], Sums]:
        """The header of what is there, and the sums of its files, which fit; of nothing where they do not."""
        path = self.folder / "header.json"
        if path.exists():
            try:
                header = read_sealed(path)
                if header["key"] != self.key:
                    raise CheckpointError(f"{path} is of something else")
                return header, {name: self._checked(name, header) for name in header["shapes"]}
            except CheckpointError as error:
                warn(f"{error}; the cache {self.folder} is made anew")
        return {"key": self.key, "shapes": {}, "rows": 0, "complete": False, "sha256": {}}, {}

    def _checked(self, name: str, header: dict[str, Any]) -> hashlib._Hash:
        """The sum of a file, cut to the rows that its header vouches for."""
        path, size = self._path(name), header["rows"] * row_bytes(*header["shapes"][name])
        if path.exists() and path.stat().st_size >= size:
            os.truncate(path, size)
            with path.open("rb") as handle:
                found = hashlib.file_digest(handle, "sha256")
            if found.hexdigest() == header["sha256"][name]:
                return found
        raise CheckpointError(f"{path} is damaged: its content is not what was written")

    def _write(
        self, chunks: Callable[[int], Iterator[Rows]], header: dict[str, Any], sums: Sums
    ) -> dict[str, Any]:
        """Append the missing rows, by plain writes: a full disk is then an error, not a signal."""
        shapes: dict[str, tuple[list[int], str]] = dict(header["shapes"])
        row, flushed = header["rows"], time.monotonic()
        with ExitStack() as stack:
            files = {name: stack.enter_context(self._path(name).open("ab")) for name in shapes}
            try:
                for chunk in chunks(row):
                    for name, values in chunk.items():
                        stored = values.detach().cpu().contiguous()
                        stored = stored.to(self.dtype) if stored.is_floating_point() else stored
                        if name not in files:
                            shapes[name] = (list(stored.shape[1:]), str(stored.numpy().dtype))
                            files[name] = stack.enter_context(self._path(name).open("wb"))
                            sums[name] = hashlib.sha256()
                        content = stored.reshape(-1).view(torch.uint8).numpy().data
                        files[name].write(content)
                        sums[name].update(content)
                    row += len(next(iter(chunk.values())))
                    if time.monotonic() - flushed > FLUSH_SECONDS:
                        self._flush(files, shapes, row, sums, complete=False)
                        flushed = time.monotonic()
            except LimbeckError:  # of what is asked: what it has said is kept
                self._flush(files, shapes, row, sums, complete=False)
                raise
            return self._flush(files, shapes, row, sums, complete=True)

    def _flush(
        self, files: Mapping[str, IO[bytes]], shapes: dict[str, Any], rows: int, sums: Sums, *, complete: bool
    ) -> dict[str, Any]:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        digests = {name: found.hexdigest() for name, found in sums.items()}
        header = {"key": self.key, "shapes": shapes, "rows": rows, "complete": complete, "sha256": digests}
        write_sealed(self.folder / "header.json", header)
        return header

    def _open(self, header: dict[str, Any]) -> None:
        for name, (shape, kind) in header["shapes"].items():
            path, form = self._path(name), (self.count, *shape)
            values = np.memmap(path, dtype=np.dtype(kind), mode="c", shape=form)
            self.rows[name] = torch.from_numpy(values.copy() if values.nbytes < IN_MEMORY_BYTES else values)

    def _path(self, name: str) -> Path:
        if Path(name).name != name:
            raise CacheError(f"cache {self.folder} names a file {name!r} elsewhere: delete that folder")
        return self.folder / f"{name}.bin"


def row_bytes(shape: list[int], kind: str) -> int:
    """Bytes of one row of ``shape`` and numpy type ``kind``."""
    return math.prod(shape) * np.dtype(kind).itemsize
