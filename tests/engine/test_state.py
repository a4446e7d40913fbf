from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor, nn

from limbeck.engine import state
from limbeck.errors import CheckpointError

tensors = st.builds(
    lambda shape, kind, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kind),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    st.integers(0, 99),
)
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(trees)
def test_a_state_comes_back_from_its_json_form(tree: Any) -> None:
    held: dict[str, Tensor] = {}
    form = json.loads(json.dumps(state.pack(tree, held)))
    assert same(state.unpack(form, held), tree)


def test_a_state_comes_back_from_disk(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tree = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "none": None}
    state.write_state(tmp_path / "one", tree)
    assert same(state.read_state(tmp_path / "one"), tree)


def test_what_is_packed_does_not_share_memory() -> None:
    weight, held = torch.zeros(2), {}
    state.pack({"a": weight, "b": weight[:1]}, held)
    weight.fill_(1)
    assert all(not value.any() for value in held.values())


@pytest.mark.parametrize("kind", [".json", ".safetensors"])
def test_no_altered_byte_of_a_state_passes(tmp_path: Path, kind: str) -> None:
    state.write_state(tmp_path / "one", {"step": 7, "weight": torch.arange(10.0)})
    path = tmp_path / f"one{kind}"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=rf"one\{kind} is damaged: its content is not what"):
            state.read_state(tmp_path / "one")


def test_a_sealed_map_is_json_and_comes_back(tmp_path: Path) -> None:
    value = {"figures": [1.5, None], "names": {"a": "b"}}
    state.write_sealed(tmp_path / "one.json", value)
    assert state.read_sealed(tmp_path / "one.json") == state.read_json(tmp_path / "one.json") == value
    found = json.loads((tmp_path / "one.json").read_text())
    assert found.pop("sha256")
    assert found == value


def test_no_altered_byte_of_sealed_figures_changes_them(tmp_path: Path) -> None:
    path, value = tmp_path / "one.json", {"accuracy": 91.5}
    state.write_sealed(path, value)
    content = path.read_bytes()
    refused = 0
    for place in range(8 * len(content)):
        flipped = bytes([content[place // 8] ^ 1 << place % 8])
        path.write_bytes(content[: place // 8] + flipped + content[place // 8 + 1 :])
        try:
            assert state.read_json(path)["accuracy"] == value["accuracy"]
        except (ValueError, CheckpointError):
            refused += 1
    assert refused > 7.9 * (len(content) - len(state.SEAL))


def test_what_killed_writers_left_is_swept_away(tmp_path: Path) -> None:
    state.write_json(tmp_path / "below" / "kept.json", {})
    (tmp_path / ".one.json.12.tmp").write_text("half")
    (tmp_path / "below" / ".folder.12.tmp").mkdir()
    (tmp_path / "below" / ".folder.12.tmp" / "file").write_text("half")
    with state.locked(tmp_path):
        left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["kept.json", "lock"]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def half(place: Path) -> None:
        (place / "one").write_text("new")
        full()

    state.write_folder(tmp_path / "out", lambda place: (place / "one").write_text("old"))  # type: ignore[arg-type,func-returns-value]
    with pytest.raises(CheckpointError, match=r"cannot write .*out: the disk is full"):
        state.write_folder(tmp_path / "out", half)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "one").read_text() == "old"


def test_a_strange_object_is_refused_by_its_place() -> None:
    with pytest.raises(CheckpointError, match=r"state at '/a/0' is a object"):
        state.pack({"a": [object()]}, {})


@pytest.mark.parametrize("kind", [".json", ".safetensors"])
@pytest.mark.parametrize("harm", ["cut", "altered", "gone", "pickled"])
def test_a_damaged_state_is_named(tmp_path: Path, kind: str, harm: str) -> None:
    state.write_state(tmp_path / "one", {"weight": torch.arange(100.0)})
    path = tmp_path / f"one{kind}"
    content = path.read_bytes()
    middle = len(content) // 2
    if harm == "cut":
        path.write_bytes(content[:middle])
    elif harm == "altered":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif harm == "pickled":
        path.write_bytes(pickle.dumps({"weight": 1}))
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"one.* is damaged") as caught:
        state.read_state(tmp_path / "one")
    assert "\n" not in str(caught.value)


# A full disk


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_rust(*_: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "name", "fails"),
    [
        (os, "fsync", full),
        (os, "replace", full),
        (state, "save_file", full_in_rust),
        (state, "save_file", full),
    ],
)
def test_a_full_disk_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, fails: Any
) -> None:
    state.write_state(tmp_path / "one", {"n": 1, "weight": torch.ones(2)})
    monkeypatch.setattr(where, name, fails)
    with pytest.raises(CheckpointError, match=r"the disk is full: free some space") as caught:
        state.write_state(tmp_path / "one", {"n": 2, "weight": torch.zeros(2)})
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert state.read_state(tmp_path / "one")["n"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "one.safetensors"]


def test_a_folder_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/one\.json: .*exists|Not a directory"):
        state.write_json(tmp_path / "file" / "one.json", {})


# Constant parts


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.backbone.constant = True
        self.head = nn.Linear(2, 1)


def test_constant_parts_stay_out_of_the_state() -> None:
    held = state.variable_state(Net())
    assert set(held) == {"head.weight", "head.bias"}
    other = Net()
    backbone = other.backbone.weight.clone()
    state.load_variable_state(other, held)
    assert torch.equal(other.head.weight, held["head.weight"])
    assert torch.equal(other.backbone.weight, backbone)


def test_the_state_of_another_network_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"does not fit this run: 'head\.bias' is in only one"):
        state.load_variable_state(Net(), {"head.weight": torch.zeros(1, 2)})


def test_equal_hashes_mean_equal_networks() -> None:
    one, other = Net(), Net()
    assert state.module_hash(one) == state.module_hash(one)
    assert state.module_hash(one) != state.module_hash(other)
    other.load_state_dict(one.state_dict())
    assert state.module_hash(one) == state.module_hash(other)
    with torch.no_grad():
        other.head.bias.mul_(-1)
    assert state.module_hash(one) != state.module_hash(other)


@given(st.dictionaries(st.text(), st.integers()))
def test_the_hash_of_a_value_does_not_know_its_order(value: dict[str, int]) -> None:
    turned = dict(reversed(value.items()))
    assert state.value_hash(value) == state.value_hash(turned)
    assert state.value_hash({**value, "one more": 0}) != state.value_hash({**value, "one more": 1})
