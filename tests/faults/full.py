"""Let the disk fill, or a folder become read-only, while a run writes; then give it room and resume it.

    python -m tests.faults.full --out FOLDER

As root the run lies on a small tmpfs of its own, filled to the last byte at a named place in the run, or
mounted read-only; else files may grow no further (RLIMIT_FSIZE), and folders lose their write permission. The
command must end with exit code 2 and one line; the newest checkpoint must be a good one; and the run that is
resumed with room must end as the one that was left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults import procedures
from tests.faults.kills import untouched
from tests.faults.places import Places

from limbeck import api, cli, plain
from limbeck.config import Recipe, dump

FORK = multiprocessing.get_context("fork")
SIZE = 24 * 2**20
PROCEDURES = ("continual", "static", "language")
AT = (
    "a step: after the update",
    "a checkpoint: weights without facts",
    "a file: written but not renamed",
    "a log line: half of it",
    "a figure: computed but not kept",
    "a cache: between its rows",
    "a cache: rows without a header",
    "a taught teacher: before it is kept",
    "the student: before it is saved",
    "the card",
    "the page",
)
Command = Callable[[], None]


class Disk:
    """A folder whose room can be taken and given back."""

    def __init__(self, place: Path) -> None:
        self.place, self.mounted = place, False
        place.mkdir(parents=True)
        if os.geteuid() == 0:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(place)]
            self.mounted = subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode == 0

    @property
    def how(self) -> str:
        """How room is taken."""
        return "a tmpfs without a free byte" if self.mounted else "a limit on the size of files"

    def fill(self) -> None:
        """Leave no room."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return
        with contextlib.suppress(OSError), (self.place / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(2**12))

    def free(self) -> None:
        """Give the room back; a limit ends with the process that it was set in."""
        (self.place / "ballast").unlink(missing_ok=True)

    def writable(self, yes: bool) -> None:
        """Allow or forbid all writing."""
        if self.mounted:
            remount = ["mount", "-o", f"remount,{'rw' if yes else 'ro'}", str(self.place)]
            subprocess.run(remount, check=True)
            return
        for path in (self.place, *self.place.rglob("*")):
            if path.is_dir():
                path.chmod(0o755 if yes else 0o555)

    def remove(self) -> None:
        """Let go of it."""
        if self.mounted:
            subprocess.run(["umount", str(self.place)], check=True)


class Filling(Places):
    """Fills the disk where a place is passed for the ``turn``-th time."""

    def __init__(self, disk: Disk, place: str, turn: int) -> None:
        super().__init__(self.fill)
        self.disk, self.place, self.turn = disk, place, turn

    def fill(self, place: str, turn: int) -> None:
        if (place, turn) == (self.place, self.turn):
            self.disk.fill()


def ended(command: list[str], before: Command = lambda: None) -> tuple[int, str]:
    """Exit code and stderr of a ``limbeck`` command in a process of its own."""

    def run() -> None:
        procedures.quick()
        before()
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.main([*command, "--json"])
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException as error:
                code, said = 1, io.StringIO(f"{type(error).__name__}: {error}")
        theirs.send((code, said.getvalue()))

    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=run)
    process.start()
    process.join()
    return ours.recv() if ours.poll() else (process.exitcode or 0, "")


def judged(code: int, said: str, folder: Path) -> str | None:
    """What is wrong with how a command ended that could not write; None where nothing is."""
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    if code != 2 or len(lines) != 1 or not lines[0].startswith("limbeck: "):
        return f"exit code {code}: {said}"
    procedures.progress(folder)  # raises where the newest checkpoint is no good one
    return None


def filled(recipe: Path, place: Path, turn: tuple[str, int], whole: Path, disk: Disk) -> dict[str, Any]:
    """What came of a disk that filled at a place of the run."""
    folder = disk.place / "run"
    run = ["run", str(recipe), "--out", str(folder)]
    code, said = ended(run, Filling(disk, *turn).patch)
    wrong = judged(code, said, folder)
    disk.free()
    again, told = ended(["resume", str(folder)] if (folder / "recipe.yaml").exists() else run)
    wrong = wrong or (f"resumed, exit code {again}: {told}" if again else None)
    wrong = wrong or procedures.where_unlike(folder, whole)
    left = procedures.left_behind(folder, whole)
    for path in disk.place.iterdir():
        shutil.rmtree(path)
    return {"at": turn[0], "said": said.strip(), "wrong": wrong or (f"left: {left}" if left else None)}


def sealed(recipe: Path, whole: Path, disk: Disk) -> Iterator[dict[str, Any]]:
    """What came of folders that cannot be written: to begin in, to resume in, to report and export in."""
    folder = disk.place / "run"
    run = ["run", str(recipe), "--out", str(folder)]

    def refused(at: str, command: list[str]) -> dict[str, Any]:
        disk.writable(False)
        code, said = ended(command)
        disk.writable(True)
        return {"at": at, "said": said.strip(), "wrong": judged(code, said, folder)}

    yield refused("begin in a read-only folder", run)
    ended(run, Filling(disk, "a step: after the update", 12).patch)
    disk.free()
    yield refused("resume in a read-only folder", ["resume", str(folder)])
    code, said = ended(["resume", str(folder)])
    wrong = f"exit code {code}: {said}" if code else procedures.where_unlike(folder, whole)
    yield {"at": "resume when it can be written again", "said": said, "wrong": wrong}
    yield refused("report in a read-only folder", ["report", str(folder)])
    yield refused("export in a read-only folder", ["export", str(folder)])
    yield refused("export as ONNX in a read-only folder", ["export", str(folder), "--onnx"])
    code, said = ended(["export", str(folder), "--onnx"], disk.fill)
    disk.free()
    yield {"at": "export as ONNX on a full disk", "said": said.strip(), "wrong": judged(code, said, folder)}
    student = api.load_student(folder)
    yield {"at": "the student after all that", "said": "", "wrong": None if student else "lost"}


def written(recipe: Recipe, to: Path) -> Path:
    """A recipe as a file."""
    to.write_text(dump(recipe), encoding="utf-8")
    assert plain.read(to)
    return to


def one(root: Path, name: str, at: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The cases of one procedure; each finds the caches empty."""
    disk = Disk(root / f"{name}-disk")
    try:
        caches = disk.place / "caches"
        recipe = written(procedures.recipe(root / "networks", name, caches), root / f"{name}.yaml")
        whole = root / f"{name} whole"
        go = procedures.procedures(root / "networks")[name]
        _, passes = untouched(go, whole, root / f"{name} whole caches")
        for place in at:
            if passes[place]:
                turn = place, (passes[place] + 1) // 2
                yield filled(recipe, root, turn, whole, disk) | {"run": name, "how": disk.how}
        if name == "static" and at == AT:
            for found in sealed(recipe, whole, disk):
                yield found | {"run": name, "how": "read-only"}
    finally:
        disk.remove()


def carry_out(out: Path, *, only: tuple[str, ...] = PROCEDURES, at: tuple[str, ...] = AT) -> dict[str, Any]:
    """Fill disks, and close folders, under ``only`` some procedures; write ``full.json``.

    Args:
        at: places where the disk fills; folders are closed too where these are all.
    """
    procedures.quick()
    began = time.monotonic()
    with procedures.workplace() as root:
        cases = [found for name in only for found in one(root, name, at)]
    table = [
        {
            "fault": f"{how}, at: {at}",
            "runs": len(own := [case for case in cases if (case["how"], case["at"]) == (how, at)]),
            "one line, and equal when resumed": sum(case["wrong"] is None for case in own),
        }
        for how, at in dict.fromkeys((case["how"], case["at"]) for case in cases)
    ]
    found = {
        "what": "A disk that fills, and folders that cannot be written. Each command ended with exit code 2 "
        "and one line, the newest checkpoint was good, and the run resumed with room ended as the untouched "
        "one.",
        "holds": all(case["wrong"] is None for case in cases),
        "command": "python -m tests.faults.full --out FOLDER",
        "seconds": round(time.monotonic() - began), "cases": len(cases), "table": table,
        "lines": sorted({case["said"].replace(str(root), "") for case in cases if case["said"]}),
        "wrong": [case for case in cases if case["wrong"]],
    }  # fmt: skip
    procedures.write(out, "full", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=PROCEDURES, help="all by default")
    given = parser.parse_args()
    if not carry_out(given.out, only=tuple(given.only or PROCEDURES))["holds"]:
        raise SystemExit("a run that could not write did not end as it should")


if __name__ == "__main__":
    main()
