"""State on disk: nested state as safetensors plus JSON, written atomically. No pickle."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.errors import CheckpointError
from limbeck.plain import from_json

State = dict[str, Any]
SEAL = '{"sha256": "'


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The JSON form of ``tree``; its tensors go into ``tensors``. Keys that are no strings survive."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().to("cpu").contiguous().clone()
        return {"$tensor": path}
    if isinstance(tree, dict):
        return {"$map": [[k, pack(v, tensors, f"{path}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "$list" if isinstance(tree, list) else "$tuple"
        return {kind: [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise CheckpointError(f"state at {path!r} is a {type(tree).__name__}: only tensors and plain values fit")


def unpack(form: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``pack``."""
    if not isinstance(form, dict):
        return form
    (kind, body), *_ = form.items()
    if kind == "$tensor":
        return tensors[body]
    if kind == "$map":
        return {k: unpack(v, tensors) for k, v in body}
    values = [unpack(v, tensors) for v in body]
    return values if kind == "$list" else tuple(values)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file, flush it to disk, then rename it to ``path``.

    Raises:
        CheckpointError: the file cannot be written; what stood at ``path`` before still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"cannot write {path}: {reason(error)}; the one before is kept") from error


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, flush its files to disk, then put it in the place of ``path``.

    Raises:
        CheckpointError: it cannot be written; what stood at ``path`` before still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for written in (*temporary.rglob("*"), temporary):
            _flush(written)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write {path}: {reason(error)}; the one before is kept") from error


def _flush(path: Path) -> None:
    """Have a file or a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: Exception) -> str:
    """Why a write failed, in words, with the fix where the disk is full."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    if full:
        return "the disk is full: free some space or point the run elsewhere with --out"
    words = getattr(error, "strerror", None) or str(error)
    return str(words).splitlines()[0] if words else type(error).__name__


def sweep(folder: Path) -> None:
    """Remove what ``write_atomically`` left in ``folder``, and below it, when its process was killed.

    No other process may be at work there.
    """
    for cut_off in (path for pattern in CUT_OFF for path in folder.rglob(pattern)):
        if cut_off.is_dir():
            shutil.rmtree(cut_off)
        else:
            cut_off.unlink()


CUT_OFF = (".*.tmp", ".tmp" + 6 * "[A-Za-z0-9]")
"""Names of what is being written: by us, and by safetensors, which has a temporary file of its own."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time into a ``folder`` that runs share; the lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep(folder)
        yield


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""

    def write(to: Path) -> None:
        to.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1))


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a map that is not empty as JSON whose first line is a digest of all that follows, atomically."""
    body = json.dumps(value, indent=1).removeprefix("{\n")
    write_text(path, f"{_seal(body.encode())}\n{body}")


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what ``write_sealed`` wrote.

    Raises:
        OSError: it cannot be read.
        CheckpointError: a byte of it is not what was written.
    """
    first, _, body = path.read_bytes().partition(b"\n")
    if first != _seal(body).encode():
        raise CheckpointError(f"{path} is damaged: its content is not what was written")
    value: dict[str, Any] = from_json("{" + body.decode())
    return value


def read_json(path: Path) -> Any:
    """The JSON in a file; where it is sealed, its content is what was written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON.
        CheckpointError: its seal does not fit.
    """
    content = path.read_bytes()
    return read_sealed(path) if content.startswith(SEAL.encode()) else from_json(content.decode())


def _seal(body: bytes) -> str:
    return f'{SEAL}{hashlib.sha256(body).hexdigest()}",'


def write_state(stem: Path, state: State) -> None:
    """Write ``state`` as ``<stem>.safetensors`` and, last, ``<stem>.json`` that vouches for it and itself."""
    tensors: dict[str, Tensor] = {}
    form = pack(state, tensors)
    weights = stem.with_suffix(".safetensors")
    write_atomically(weights, lambda to: save_file(tensors, to))
    write_sealed(stem.with_suffix(".json"), {"weights": file_hash(weights), "state": form})


def read_state(stem: Path) -> State:
    """Read what ``write_state`` wrote.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
    """
    weights = stem.with_suffix(".safetensors")
    try:
        record = read_sealed(stem.with_suffix(".json"))
        if file_hash(weights) != record["weights"]:
            raise CheckpointError(f"{weights} is damaged: its content is not what was written")
        state: State = unpack(record["state"], load_file(weights))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {stem} is damaged ({type(error).__name__})") from error
    return state


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tensors_hash(named: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def module_hash(module: nn.Module) -> str:
    """SHA-256 over all parameters and buffers of ``module``: equal hashes, equal network."""
    return tensors_hash(iter(sorted(module.state_dict().items())))


def value_hash(value: Any) -> str:
    """Short stable hash of plain data (JSON order does not matter)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]


def constant_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parts that never change and are rebuilt from the recipe (``constant = True``)."""
    return tuple(f"{name}." for name, part in module.named_modules() if getattr(part, "constant", False))


def variable_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of ``module`` without its constant parts: what a checkpoint must hold."""
    skip = constant_prefixes(module)
    return {k: v for k, v in module.state_dict().items() if not k.startswith(skip)}


def load_variable_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what ``variable_state`` gave.

    Raises:
        CheckpointError: the state belongs to a module of other parts.
    """
    skip = constant_prefixes(module)
    own = {k for k in module.state_dict() if not k.startswith(skip)}
    if own != set(state):
        odd = sorted(own ^ set(state))[0]
        raise CheckpointError(
            f"the checkpoint does not fit this run: {odd!r} is in only one of the two: put the recipe back "
            "as it was, or start the run anew"
        )
    for name, value in module.state_dict().items():
        if name in own and value.shape != state[name].shape:
            raise CheckpointError(
                f"the checkpoint does not fit this run: {name!r} is {list(state[name].shape)} in it but "
                f"{list(value.shape)} here: put the recipe back as it was, or start the run anew"
            )
    module.load_state_dict(state, strict=False)
