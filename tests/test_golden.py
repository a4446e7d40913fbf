"""Every reference vector, forward and gradient, through the public functions.

The folder is ``tests/golden`` or ``LIMBECK_GOLDEN``. A vector without an adapter fails.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("LIMBECK_GOLDEN", HERE / "golden"))
CASES = sorted(ROOT.rglob("*.npz"))

# Relative tolerance by dtype; the absolute one only covers zeros that come out as rounding.
TOLERANCE = {"float64": (1e-6, 1e-12), "float32": (1e-4, 1e-7)}


class Case:
    """One reference vector: inputs by name, ``args``, ``system`` and ``function``."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(str(arrays.pop("meta")))
        self.system: str = meta["system"]
        self.function: str = meta["function"]
        self.args: dict[str, Any] = meta["args"]
        self.expected = {name: a for name, a in arrays.items() if name.startswith("out_")}
        self.inputs = {name: a for name, a in arrays.items() if not name.startswith("out_")}

    @property
    def key(self) -> tuple[str, str]:
        return self.system, self.function

    def __contains__(self, name: str) -> bool:
        return name in self.inputs

    def __getitem__(self, name: str) -> Tensor:
        return torch.as_tensor(self.inputs[name].copy())

    def leaf(self, name: str) -> Tensor:
        return self[name].requires_grad_()

    def weights(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): self[name] for name in self.inputs if name.startswith(prefix)}

    @staticmethod
    def grads(loss: Tensor, **leaves: Tensor) -> dict[str, Tensor]:
        """``{"out_grad_<name>": gradient of the loss}``; zeros where the loss does not depend on it."""
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        return {f"out_grad_{n}": torch.zeros_like(x) if g is None else g for (n, x), g in pairs}


def tables() -> Iterator[Any]:
    for path in sorted((HERE / "golden_adapters").glob("[!_]*.py")):
        spec = importlib.util.spec_from_file_location(f"golden_adapters_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def adapters() -> dict[tuple[str, str], Callable[[Case], dict[str, Any]]]:
    found: dict[tuple[str, str], Callable[[Case], dict[str, Any]]] = {}
    for module in tables():
        twice = found.keys() & module.ADAPTERS.keys()
        assert not twice, f"{module.__name__} defines adapters that exist already: {sorted(twice)}"
        found |= module.ADAPTERS
    return found


@pytest.fixture(scope="module")
def ignored() -> dict[tuple[str, str], dict[str, str]]:
    return {key: names for module in tables() for key, names in getattr(module, "IGNORED", {}).items()}


def test_there_are_vectors() -> None:
    assert CASES, f"no reference vectors under {ROOT}"


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_vector(path: Path, adapters: Any, ignored: Any) -> None:
    case = Case(path)
    if case.key not in adapters:
        pytest.fail(f"no adapter for {case.key}: add one to a module of tests/golden_adapters", pytrace=False)
    got = adapters[case.key](case)
    wanted = case.expected.keys() - ignored.get(case.key, {}).keys()
    assert not wanted - got.keys(), f"the adapter gives no {sorted(wanted - got.keys())}"
    for name in sorted(wanted):
        compare(name, got[name], case.expected[name])


def compare(name: str, got: Any, want: np.ndarray[Any, Any]) -> None:
    value = got.detach().numpy() if isinstance(got, Tensor) else np.asarray(got)
    assert value.shape == want.shape, f"{name}: shape {value.shape}, expected {want.shape}"
    if want.dtype.name not in TOLERANCE:
        np.testing.assert_array_equal(value, want, err_msg=name)
        return
    rtol, atol = TOLERANCE[want.dtype.name]
    np.testing.assert_allclose(value, want, rtol=rtol, atol=atol, err_msg=name)
