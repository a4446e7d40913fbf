"""State on disk: nested state as safetensors plus JSON, written atomically. No pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.errors import CheckpointError
from limbeck.plain import from_json

State = dict[str, Any]


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
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"cannot write {path}: {reason(error)}; the one before is kept") from error


def reason(error: Exception) -> str:
    """Why a write failed, in words, with the fix where the disk is full."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    if full:
        return "the disk is full: free some space or point the run elsewhere with --out"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""

    def write(to: Path) -> None:
        to.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1))


def write_state(stem: Path, state: State) -> None:
    """Write ``state`` as ``<stem>.safetensors`` and, last, ``<stem>.json`` that vouches for it."""
    tensors: dict[str, Tensor] = {}
    form = pack(state, tensors)
    weights = stem.with_suffix(".safetensors")
    write_atomically(weights, lambda to: save_file(tensors, to))
    write_json(stem.with_suffix(".json"), {"sha256": file_hash(weights), "state": form})


def read_state(stem: Path) -> State:
    """Read what ``write_state`` wrote.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
    """
    weights, facts = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    try:
        record = from_json(facts.read_text(encoding="utf-8"))
        if file_hash(weights) != record["sha256"]:
            raise CheckpointError(f"checkpoint {weights} is damaged: its content is not what was written")
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
