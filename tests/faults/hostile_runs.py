"""Hostile run folders: given to resume, report, compare, study and export."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.hostile import WORDS, Case, changed_tree, mutated, odd_value, pickled
from tests.faults.hostile_nets import safetensors_file
from tests.faults.hostile_recipes import refused_by_cli, tiny

from limbeck import api
from limbeck.report import compare, page, study

SETS = (
    "teacher.network.hidden=[8]",
    "student.hidden=[8]",
    "scenario.epochs=1",
    "scenario.teacher_epochs=1",
    "engine.checkpoint_seconds=0",
    "engine.keep_checkpoints=999",
    "engine.cache=false",
    "engine.log_every=1",
    "engine.reuse_teachers=false",
    "engine.threads=1",
    "scenario.batch_size=50",
)
COMMANDS = ("resume", "report", "compare", "study", "export")


def finished_run(folder: Path) -> Path:
    """A finished run of seconds, with a checkpoint of each step."""
    if not folder.exists():
        api.run("kd", SETS, out=folder, quiet=True)
    return folder


def copied(whole: Path, folder: Path, *, cut: bool) -> Path:
    """A copy of the run; where it is ``cut``, as it was in the middle of its second stage."""
    place = folder / "run"
    if place.is_symlink():
        place.unlink()
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
    if cut:
        (place / "result.json").unlink()
        numbers = sorted((place / "checkpoints").glob("[0-9]*.json"))
        for file in numbers[-2:]:
            file.unlink()
            file.with_suffix(".safetensors").unlink()
        for file in numbers[:-4]:
            file.unlink()
            file.with_suffix(".safetensors").unlink()
    return place


def spoil(random: Random, place: Path) -> str:
    """Change one file of a run; what was done."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    target = (
        random.choice(files)
        if random.random() < 0.4
        else place
        / random.choice(
            (
                "recipe.yaml",
                "result.json",
                "metrics.jsonl",
                "student/config.json",
                "versions.json",
                "student/model.safetensors",
            )
        )
    )
    if not target.exists():
        target = place / "metrics.jsonl"
    raw = target.read_bytes()
    pick = random.random()
    said = f"{target.relative_to(place)}"
    if pick < 0.1:
        target.unlink()
        if random.random() < 0.5:
            random.choice(
                (lambda: target.mkdir(), lambda: target.symlink_to(target), lambda: os.mkfifo(target))
            )()
        return f"{said} is gone"
    if pick < 0.3 or target.suffix == ".html":
        target.write_bytes(
            random.choice((mutated(random, raw), b"", pickled(), b"[" * 9999, b"null", b"\xff\xfe"))
        )
        return f"{said}: bytes"
    if target.suffix == ".safetensors":
        target.write_bytes(safetensors_file(random, raw))
        return f"{said}: header"
    if target.suffix == ".jsonl":
        lines = raw.decode().splitlines()
        at = random.randrange(len(lines))
        lines[at] = json.dumps(changed_tree(random, json.loads(lines[at])))
        target.write_text("\n".join(lines) + "\n")
        return f"{said}: {lines[at][:900]}"
    if target.suffix in (".json", ".yaml"):
        tree = changed_tree(random, read_tree(target))
        text = json.dumps(tree)
        if tiny(tree):
            target.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"{said}: {text[:1500]}"
    return said


def read_tree(path: Path) -> Any:
    """What a JSON or YAML file holds."""
    from limbeck import plain

    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else plain.parse(text, str(path))


def given(random: Random, place: Path, other: Path) -> Case:
    """One command on a run."""
    match random.choice(COMMANDS):
        case "resume":
            return Case("resume", lambda: api.resume(place, quiet=True))
        case "report":
            return Case("report", lambda: page.write_page(place))
        case "compare":
            return Case("compare", lambda: compare.compare([other, place], mixed=True).data)
        case "study":
            return Case("study", lambda: study.study([other, place], baseline="kd").data)
        case _:
            return Case("export", lambda: (api.export(place), api.load_student(place)))


def run_folders(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Finished and cut-off runs with one thing changed."""
    whole = finished_run(folder / "whole")
    for _ in range(count):
        place = copied(whole, folder, cut=random.random() < 0.4)
        said = spoil(random, place)
        case = given(random, place, whole)
        yield Case(f"{case.said}: {said}", case.run)


def run_paths(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Paths that are no run, through the command line."""
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to(folder / "loop")
    for _ in range(count):
        path = random.choice(
            (*WORDS, str(folder / "empty"), str(folder / "file"), str(folder / "loop"), "/dev/null")
        )
        command = random.choice(
            ("resume", "report", "compare", "export", "study", "run", "show", "list", "pretrain")
        )
        words = [command, path.encode("utf-8", "replace").decode().replace("\x00", "")]
        words += random.choice(
            ([], ["--json"], ["--seed", str(odd_value(random))], ["--baseline", "x"], ["--oops"])
        )
        words = [word.replace("\x00", "").encode("utf-8", "replace").decode() for word in words]
        if words[1] not in ("-h", "--help") and (command, path) not in (("list", ""),):
            yield Case(f"limbeck {words}", lambda words=words: refused_by_cli(*words))


KINDS = {"run folders": (2, run_folders), "commands": (3, run_paths)}
