"""Flip a bit in a file that a run reads back, and see what the resumed run makes of it.

    python -m tests.faults.flips --out FOLDER

A run is cut off before its last step, with a checkpoint at every step, a captured teacher, cached query
features and a kept teacher; another is finished. Each case is a copy of one of them with one bit of one file
flipped at random. It must end with the weights of the untouched run, or with a ``LimbeckError`` of one line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.faults import procedures
from tests.faults.kills import Deadly, untouched
from tests.faults.procedures import Go

from limbeck import api
from limbeck.errors import LimbeckError

FORK = multiprocessing.get_context("fork")
PROCEDURES = ("continual", "static")
AT = "a step: before the update"
CUT_OFF = {
    "a checkpoint's weights": "run/checkpoints/[0-9]*.safetensors",
    "a checkpoint's facts": "run/checkpoints/[0-9]*.json",
    "facts.json": "run/checkpoints/facts.json",
    "recipe.yaml": "run/recipe.yaml",
    "metrics.jsonl": "run/metrics.jsonl",
    "a captured teacher": "run/cache/*/*.bin",
    "a captured teacher's header": "run/cache/*/header.json",
    "query features": "caches/[!t]*/*.bin",
    "query features' header": "caches/[!t]*/header.json",
    "a frozen network's weights": "networks/*/model.safetensors",
}
SHARED = {
    "a kept teacher's weights": "caches/teachers/*.safetensors",
    "a kept teacher's facts": "caches/teachers/*.json",
}
FINISHED = {"the student": "run/student/[cm]*", "result.json": "run/result.json"}
OUTCOMES = ("named, and mended", "refused in one line", "made no difference", "silently wrong", "broke")
Said = tuple[str, str]


def flip(path: Path, chance: random.Random) -> None:
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def within(call: Callable[[], Any]) -> Said:
    """What a call says on stderr, and how it ends: ``done``, ``refused`` or ``broke``."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            call()
            return "done", said.getvalue()
        except LimbeckError as error:
            one = "\n" not in str(error)
            return "refused" if one else "broke", f"{said.getvalue()}{error}"
        except Exception:
            return "broke", traceback.format_exc()


def outcome(ended: str, said: str, equal: bool) -> str:
    """Which of ``OUTCOMES`` it was."""
    if ended == "done":
        if not equal:
            return "silently wrong"
        return "named, and mended" if "warning: " in said else "made no difference"
    return "refused in one line" if ended == "refused" else "broke"


def resumed(go: Go, whole: Path, place: Path) -> str:
    """What came of a flip in a run that was cut off, or in what a run finds where it begins."""
    ended, said = within(lambda: go(place / "run", place / "caches"))
    equal = ended == "done" and student(place / "run") == student(whole / "run")
    found = outcome(ended, said, equal)
    return f"broke: {said}" if found == "broke" else found


def opened(whole: Path, place: Path) -> str:
    """What came of a flip in a finished run: its student is loaded, and its figures are asked for."""

    def both() -> None:
        kept.update(api.load_student(place / "run").state_dict())
        figures.update(api.resume(place / "run", quiet=True).data)

    kept: dict[str, torch.Tensor] = {}
    figures: dict[str, Any] = {}
    ended, said = within(both)
    equal = ended == "done" and student(place / "run") == student(whole / "run")
    equal = equal and figures == api.read_result(whole / "run")
    found = outcome(ended, said, equal)
    return f"broke: {said}" if found == "broke" else found


def student(run: Path) -> dict[str, bytes]:
    """The student's files, but for the card."""
    return {p.name: p.read_bytes() for p in (run / "student").iterdir() if p.name != "README.md"}


def cut_off(go: Go, place: Path, turn: int) -> None:
    """A run that was killed in its ``turn``-th step."""

    def attempt() -> None:
        procedures.quick()
        Deadly(AT, turn).patch()
        go(place / "run", place / "caches")

    process = FORK.Process(target=attempt)
    process.start()
    process.join()
    if not any((place / "run" / "checkpoints").glob("[0-9]*.json")):
        raise SystemExit(f"{place} was to be cut off but was not")


def targets(place: Path, kinds: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """The files of each kind that are there, relative to ``place``."""
    for kind, pattern in kinds.items():
        for path in sorted(place.glob(pattern)):
            yield kind, path.relative_to(place)


def tried(
    place: Path, kinds: dict[str, str], count: int, chance: random.Random, ask: Callable[[Path], str]
) -> Iterator[tuple[str, str]]:
    """Kind and outcome of ``count`` flips, the kinds in turn."""
    by_kind: dict[str, list[Path]] = {}
    for kind, path in targets(place, kinds):
        by_kind.setdefault(kind, []).append(path)
    if not by_kind:  # the run shares nothing of these kinds
        return
    names = list(by_kind)
    kept = place.with_name(f"{place.name} kept")
    shutil.copytree(place, kept)
    for number in range(count):
        kind = names[number % len(names)]
        flip(place / chance.choice(by_kind[kind]), chance)
        yield kind, ask(place)
        shutil.rmtree(place)
        shutil.copytree(kept, place)
    shutil.rmtree(kept)


def cases(root: Path, count: int, chance: random.Random, only: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Flips in runs that were cut off, in what runs share before another one begins, in finished runs."""
    for name in only:
        place, whole = root / name, root / f"{name} whole"
        go = procedures.procedures(place / "networks")[name]
        _, passes = untouched(go, whole / "run", whole / "caches")
        cut_off(go, place, passes[AT] - 1)
        ask = partial(resumed, go, whole)
        yield from tried(place, CUT_OFF, count * 10 // 48, chance, ask)
        shutil.rmtree(place / "run")
        yield from tried(place, SHARED, count * 2 // 48, chance, ask)
        shutil.copytree(whole / "run", place / "run")
        yield from tried(place, FINISHED, count * 13 // 48, chance, partial(opened, whole))


def carry_out(
    out: Path, *, seed: int = 0, count: int = 528, only: tuple[str, ...] = PROCEDURES
) -> dict[str, Any]:
    """Flip ``count`` bits; write ``flips.json``."""
    procedures.quick()
    api.write_page = lambda folder: Path(folder)  # never read back
    chance, began = random.Random(seed), time.monotonic()
    seen: dict[str, Counter[str]] = {}
    broken: list[str] = []
    with procedures.workplace() as root:
        for kind, came in cases(root, count, chance, only):
            name, _, why = came.partition(": ")
            seen.setdefault(kind, Counter())[name] += 1
            broken += [f"{kind}: {why}"] if why else []
    table = [
        {"file": kind, "flips": sum(came.values())} | {name: came[name] for name in OUTCOMES}
        for kind, came in seen.items()
    ]
    found = {
        "what": "One bit flipped at random in a file that a run reads back.",
        "holds": not any(row["silently wrong"] or row["broke"] for row in table),
        "command": "python -m tests.faults.flips --out FOLDER",
        "seed": seed, "seconds": round(time.monotonic() - began),
        "flips": sum(row["flips"] for row in table), "table": table, "broken": broken,
    }  # fmt: skip
    procedures.write(out, "flips", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flips", type=int, default=528)
    given = parser.parse_args()
    found = carry_out(given.out, seed=given.seed, count=given.flips)
    if not found["holds"]:
        raise SystemExit("a flipped bit passed unnoticed, or broke the program")


if __name__ == "__main__":
    main()
