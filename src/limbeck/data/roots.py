"""Where data lies on this machine: the one place that reads the environment for it."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from limbeck.errors import DataError

VARIABLE = "LIMBECK_DATA"


def roots(root: str | None) -> list[Path]:
    """The folders to look in: ``root`` alone where given, else the environment's ``LIMBECK_DATA``.

    Args:
        root: the field of a data set's configuration. ``LIMBECK_DATA`` may name several folders, parted by
            the system's path separator.

    Raises:
        DataError: a folder that was named is not there.
    """
    named = [root] if root is not None else os.environ.get(VARIABLE, "").split(os.pathsep)
    folders = [Path(os.path.expanduser(name)) for name in named if name]
    for folder in folders:
        if not os.path.exists(folder):
            origin = "data.root" if root is not None else VARIABLE
            raise DataError(
                f"{origin} names {str(folder)!r}, which is not there: give an existing folder or file"
            )
    return folders


def find(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The first of ``names`` that is in one of ``folders`` (or is one of them), or None."""

    def places() -> Iterator[Path]:
        for folder in folders:
            for name in names:
                yield folder if folder.name == name else folder / name

    return next((place for place in places() if os.path.exists(place)), None)


def missing(what: str, *ways: str) -> DataError:
    """The error for data that cannot be had, with the ways to get it."""
    return DataError(f"{what} is not on this machine: {'; or '.join(ways)}")


def fetch(url: str, target: Path, md5: str) -> Path:
    """``target``, downloaded from ``url`` unless it is there.

    Raises:
        DataError: the download fails, or what came is not what was expected.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        urllib.request.urlretrieve(url, part)
    except OSError as error:
        raise DataError(
            f"cannot download {url}: {error}: fetch it elsewhere and put it at {target}"
        ) from error
    if hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() != md5:
        part.unlink()
        raise DataError(f"{url} gave another file than expected (its MD5 differs): nothing was kept")
    part.replace(target)
    return target


def cache_folder(folders: Sequence[Path]) -> Path:
    """Where downloads go: the first folder that was named, else ``limbeck`` in the user's cache."""
    if folders and os.access(folders[0], os.W_OK):
        return folders[0]
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "limbeck"
