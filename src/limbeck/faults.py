"""Common faults of a set-up, each with its fix: what `limbeck doctor` looks for."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GIB = 2**30
DISK, MEMORY = 2 * GIB, 2 * GIB
"""Below these a run may not end."""
PAIRS = {(2, minor): (0, minor + 15) for minor in range(6, 14)}
"""torch's version and the torchvision made for it, from the oldest that is supported."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, or slowly.

    Attributes:
        what: what was found.
        fix: what to do.
    """

    what: str
    fix: str


@dataclass(frozen=True)
class Machine:
    """What is looked at.

    Attributes:
        environment: the environment's variables.
        version: gives the version of a package; None where it is missing.
        vision_loads: whether torchvision's compiled operators load.
        torch_cuda: whether torch was built for CUDA.
        driver: whether the machine has an NVIDIA driver.
        cores: processors of the machine.
        allowed: processors that this process may use, by its affinity and control group.
        threads: torch's threads.
        memory: bytes that may be used.
        runs: folder in which runs are made.
    """

    environment: Mapping[str, str]
    version: Callable[[str], str | None]
    vision_loads: bool
    torch_cuda: bool
    driver: bool
    cores: int
    allowed: float
    threads: int
    memory: float
    runs: Path


def this_machine() -> Machine:
    """The machine that this runs on."""
    import torch

    from limbeck.nets.torchvision_ops import declared

    cores = os.cpu_count() or 1
    reachable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return Machine(
        environment=os.environ,
        version=version,
        vision_loads=not declared(),
        torch_cuda=torch.version.cuda is not None,
        driver=shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists(),
        cores=cores,
        allowed=min(reachable, quota()),
        threads=torch.get_num_threads(),
        memory=min(installed_memory(), group_limit("memory.max", "memory/memory.limit_in_bytes")),
        runs=Path.cwd(),
    )


def version(package: str) -> str | None:
    """The installed version of a package; None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed_memory() -> float:
    """Bytes of memory; infinite where the system does not tell."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return float("inf")
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Processors that the control group grants; infinite where it sets no limit."""
    try:
        granted, period = (root / "cpu.max").read_text().split()
        return float("inf") if granted == "max" else int(granted) / int(period)
    except (OSError, ValueError):
        return float("inf")


def group_limit(*names: str, root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the control group grants; infinite where it sets no limit."""
    for name in names:
        try:
            return float((root / name).read_text())
        except (OSError, ValueError):  # no such file, or the word max
            continue
    return float("inf")


def faults(machine: Machine) -> list[Fault]:
    """All faults found, the gravest first."""
    found = (packages, places, room, speed, network)
    return [fault for look in found for fault in look(machine)]


def packages(machine: Machine) -> Iterator[Fault]:
    """torch and torchvision that do not fit each other, or the machine."""
    torch, vision = machine.version("torch"), machine.version("torchvision")
    if torch is None or vision is None:
        return
    pair = PAIRS.get(numbers(torch))
    if pair is not None and numbers(vision) != pair:
        yield Fault(
            f"torchvision {vision} is not the one made for torch {torch}, which is {pair[0]}.{pair[1]}",
            f"pip install 'torchvision=={pair[0]}.{pair[1]}.*'",
        )
    if not machine.vision_loads:
        yield Fault(
            f"torchvision {vision} is built for another torch than {torch}, as with CUDA: its import ends "
            "in 'operator torchvision::nms does not exist'; limbeck declares what is missing",
            "nothing for limbeck; else pip install --force-reinstall torchvision --index-url "
            "https://download.pytorch.org/whl/cpu",
        )
    if machine.driver and not machine.torch_cuda:
        yield Fault(
            "there is an NVIDIA driver but torch is built for the CPU: the GPU is not used",
            "install torch with CUDA, as pytorch.org/get-started says",
        )


def numbers(text: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    first, second, *_ = (*map(int, re.findall(r"\d+", text)), 0, 0)
    return first, second


def places(machine: Machine) -> Iterator[Fault]:
    """Folders that are not there, or that nothing can be written into."""
    for name in machine.environment.get("LIMBECK_DATA", "").split(os.pathsep):
        if name and not os.path.isdir(os.path.expanduser(name)):
            yield Fault(f"LIMBECK_DATA names {name!r}, which is no folder", "make it, or unset LIMBECK_DATA")
    cache = machine.environment.get("LIMBECK_CACHE")
    if cache is not None and not os.path.isdir(cache):
        yield Fault(f"LIMBECK_CACHE names {cache!r}, which is no folder", "make it, or unset LIMBECK_CACHE")
    for what, folder in (("runs", machine.runs), ("LIMBECK_CACHE", cache)):
        if folder and os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
            yield Fault(
                f"nothing can be written into {str(folder)!r} ({what})",
                "name another folder: --out for a run, LIMBECK_CACHE for caches",
            )


def room(machine: Machine) -> Iterator[Fault]:
    """Little disk or memory."""
    folders = (str(machine.runs), machine.environment.get("LIMBECK_CACHE", ""))
    for folder in dict.fromkeys(filter(os.path.isdir, folders)):
        free = shutil.disk_usage(folder).free
        if free < DISK:
            yield Fault(
                f"{free / GIB:.1f} GiB are free in {folder!r}: checkpoints and caches may not fit",
                "free some, or point --out and LIMBECK_CACHE elsewhere",
            )
    if machine.memory < MEMORY:
        yield Fault(
            f"{machine.memory / GIB:.1f} GiB of memory may be used: runs may be killed",
            "take smaller batches (scenario.batch_size), or raise the limit",
        )


def speed(machine: Machine) -> Iterator[Fault]:
    """Threads that do not fit the processors."""
    usable = max(1, int(machine.allowed))
    asked = machine.environment.get("OMP_NUM_THREADS", "")
    if asked and not asked.isdigit():
        yield Fault(f"OMP_NUM_THREADS is {asked!r}, no number", "unset it, or set it to the cores")
    if machine.threads > usable:
        yield Fault(
            f"torch takes {machine.threads} threads but {usable} of {machine.cores} processors may be used: "
            "they wait for one another",
            f"set OMP_NUM_THREADS={usable}, or engine.threads={usable}",
        )
    elif machine.threads == 1 and usable >= 4:
        yield Fault(
            f"torch takes 1 thread where {usable} processors may be used",
            f"unset OMP_NUM_THREADS, or set engine.threads={usable}; with several --jobs it is right",
        )


def network(machine: Machine) -> Iterator[Fault]:
    """Settings that keep models from being fetched."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if machine.environment.get(name, "").upper() in ("1", "TRUE", "YES", "ON"):
            yield Fault(
                f"{name} is set: models and data sets of the Hugging Face hub come from its cache alone",
                f"unset {name} to fetch others, or name local folders",
            )
