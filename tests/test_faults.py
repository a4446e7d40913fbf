"""What `limbeck doctor` finds in a set-up, each fault staged, and that it finds none where none is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.test_cli import call

from limbeck import faults
from limbeck.faults import GIB, Machine

GOOD = {"torch": "2.13.0", "torchvision": "0.28.0"}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One without a fault."""
    return Machine(
        environment={}, version=GOOD.get, vision_loads=True, torch_cuda=False, driver=False, cores=8,
        allowed=8, threads=8, memory=16 * GIB, runs=tmp_path,
    )  # fmt: skip


def test_a_good_one_has_none(machine: Machine) -> None:
    assert faults.faults(machine) == []


STAGED: dict[str, tuple[dict[str, Any], str, str]] = {
    "CPU torch, CUDA torchvision": (
        {"vision_loads": False},
        "torchvision::nms does not exist",
        "nothing for limbeck",
    ),
    "versions apart": (
        {"version": {"torch": "2.13.0", "torchvision": "0.21.0+cpu"}.get},
        "torchvision 0.21.0+cpu is not the one made for torch 2.13.0, which is 0.28",
        r"pip install 'torchvision==0.28.*'",
    ),
    "a GPU that is not used": ({"driver": True}, "NVIDIA driver but torch is built for the CPU", "with CUDA"),
    "no data folder": (
        {"environment": {"LIMBECK_DATA": "/nowhere"}}, "LIMBECK_DATA names '/nowhere'", "unset LIMBECK_DATA",
    ),
    "no cache folder": (
        {"environment": {"LIMBECK_CACHE": "/nowhere"}}, "LIMBECK_CACHE names '/nowhere'", "unset",
    ),
    "little memory": ({"memory": GIB}, "1.0 GiB of memory may be used", "smaller batches"),
    "too many threads": ({"threads": 9}, "9 threads but 8 of 8 processors", "OMP_NUM_THREADS=8"),
    "a control group": ({"allowed": 1.5}, "8 threads but 1 of 8 processors", "engine.threads=1"),
    "one thread": ({"threads": 1}, "1 thread where 8 processors", "unset OMP_NUM_THREADS"),
    "threads that are none": ({"environment": {"OMP_NUM_THREADS": "x"}}, "'x', no number", "unset it"),
    "offline": ({"environment": {"HF_HUB_OFFLINE": "1"}}, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
}  # fmt: skip


@pytest.mark.parametrize("case", STAGED)
def test_a_fault_and_its_fix(machine: Machine, case: str) -> None:
    changes, what, fix = STAGED[case]
    (found,) = faults.faults(replace(machine, **changes))
    assert what in found.what and fix in found.fix


def test_little_disk(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": GIB})
    monkeypatch.setattr(faults.shutil, "disk_usage", lambda _: usage)
    (found,) = faults.faults(machine)
    assert "1.0 GiB are free" in found.what and "--out" in found.fix


def test_a_folder_that_is_read_only(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults.os, "access", lambda *_: False)  # root may write anywhere
    (found,) = faults.faults(machine)
    assert "nothing can be written into" in found.what and "--out" in found.fix


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000", 1.5), ("max 100000", float("inf")), ("x", float("inf"))]
)
def test_the_grant_of_a_control_group(tmp_path: Path, text: str, cores: float) -> None:
    (tmp_path / "cpu.max").write_text(text)
    (tmp_path / "memory.max").write_text("1024")
    assert faults.quota(tmp_path) == cores
    assert faults.group_limit("memory.max", root=tmp_path) == 1024
    assert faults.group_limit("none", root=tmp_path) == float("inf")


def test_they_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", "/nowhere")
    assert call("doctor", "--json") == 0
    told = json.loads(capsys.readouterr().out)["faults"]
    assert {
        "what": "LIMBECK_CACHE names '/nowhere', which is no folder",
        "fix": "make it, or unset LIMBECK_CACHE",
    } in told
    assert call("doctor") == 0
    assert "make it, or unset LIMBECK_CACHE" in " ".join(capsys.readouterr().out.split())
