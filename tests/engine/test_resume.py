"""A run that is cut off anywhere and resumed ends like one that was not: the same weights bit for bit, the
same figures, the same log."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tests.engine import small, toy
from torch import nn

from limbeck import api
from limbeck.contracts import Batch, Progress
from limbeck.engine import run as run_module
from limbeck.engine import shared, state
from limbeck.engine.fit import fit
from limbeck.engine.run import Run
from limbeck.engine.settings import Engine
from limbeck.engine.state import read_state
from limbeck.errors import ConfigError, Interrupted
from limbeck.metrics import cost
from limbeck.scenarios.session import Session


class Killed(BaseException):
    """Ends a run as ``kill -9`` does: nothing on the way out writes anything."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report, the timing of forward passes and the flushing to disk: no part of surviving the
    end of a process."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@functools.cache
def image_folder(place: Path) -> Path:
    """Digits as image files, read when asked for."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images[:240], digits.target[:240], strict=True)):
        path = place / "images" / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).save(path)
    return place / "images"


VARIANTS: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "plain": lambda _: (),
    "no cache": lambda _: ("engine.cache=false",),
    "joint": lambda _: small.JOINT,
    "fresh views": lambda _: small.FRESH,
    "replayed views": lambda _: (*small.REPLAYED, "scenario.epochs=3"),
    "selected": lambda _: ("selector={name: random, fraction: 0.6}",),
    "lazy": lambda place: (f"data={{name: folder, root: {image_folder(place)}, side: 8}}", *small.FRESH),
    "dualprompt": lambda _: (
        "student.prompts={name: dualprompt, g_blocks: [0], e_blocks: [1]}",
        "teacher.prompts={name: dualprompt, g_blocks: [0], e_blocks: [1]}",
    ),
    "apt": lambda _: ("student.prompts={name: apt}", "teacher.prompts={name: apt}"),
}


def begin(place: Path, variant: str, folder: Path, *more: str) -> None:
    caches = f"engine.cache_root={folder}.caches"
    asked = small.recipe(place, "scenario.epochs=2", *VARIANTS[variant](place), caches, *more)
    api.run(asked, out=folder, quiet=True)


@functools.cache
def uninterrupted(place: Path, variant: str) -> Path:
    folder = place / variant
    begin(place, variant, folder)
    return folder


def dies_at(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    last_act: Callable[..., Any] | None = None,
) -> None:
    """The process ends in the given call (from 1) of a function, after its ``last_act``."""
    calls = 0
    true = getattr(owner, name)

    def deadly(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            if last_act is not None:
                last_act(*arguments, **named)
            raise Killed
        return true(*arguments, **named)

    monkeypatch.setattr(owner, name, deadly)


def half_a_file(_: Any, path: Path) -> None:
    path.write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")


STEPS = 10  # of a stage; joint has one stage a task, the others two
EVERY_STEP = "engine.checkpoint_seconds=0"

POINTS: dict[str, tuple[str, tuple[Any, str, int], tuple[str, ...]]] = {
    "teacher, first stage": ("plain", (Run, "diagnoses", 7), ()),
    "teacher, second task": ("plain", (Run, "diagnoses", 2 * STEPS + 7), (EVERY_STEP,)),
    "student, second task": ("fresh views", (Run, "diagnoses", 3 * STEPS + 9), (EVERY_STEP,)),
    "student, before a checkpoint": ("replayed views", (Run, "diagnoses", 50), ()),
    "without caches": ("no cache", (Run, "diagnoses", 3 * STEPS + 9), (EVERY_STEP,)),
    "joint": ("joint", (Run, "diagnoses", STEPS + 9), (EVERY_STEP,)),
    "a selection": ("selected", (Run, "diagnoses", 29), (EVERY_STEP,)),
    "a lazy data set": ("lazy", (Run, "diagnoses", 21), (EVERY_STEP,)),
    "expert prompts": ("dualprompt", (Run, "diagnoses", 3 * STEPS + 9), (EVERY_STEP,)),
    "averaged prompts": ("apt", (Run, "diagnoses", 3 * STEPS + 9), (EVERY_STEP,)),
    "between stages": ("plain", (Run, "enter", 4), ()),
    "evaluation": ("plain", (Session, "_measure", 2), ()),
    "the last figures": ("plain", (api, "save_student", 1), ()),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    variant, end, settings = POINTS[point]
    whole = uninterrupted(place, variant)
    with monkeypatch.context() as deadly:
        dies_at(deadly, *end)
        with pytest.raises(Killed):
            begin(place, variant, tmp_path / "run", *settings)
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("name", "last_act"),
    [("save_file", half_a_file), ("save_file", None), ("write_sealed", None)],
    ids=["half of the weights", "before the weights", "between weights and facts"],
)
def test_killed_while_a_checkpoint_is_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, last_act: Any
) -> None:
    whole = uninterrupted(place, "plain")
    with monkeypatch.context() as deadly:
        dies_at(deadly, state, name, 2 * STEPS, last_act)
        with pytest.raises(Killed):
            begin(place, "plain", tmp_path / "run", EVERY_STEP)
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(tmp_path / "run", whole)


def cut_off(stem: Path, _: Any) -> None:
    """What safetensors has on the disk before it puts a file in its place."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    (stem.parent / ".tmpA1b2C3").write_bytes(b"half")


@pytest.mark.parametrize("owner", [shared, run_module], ids=["a kept teacher", "a checkpoint"])
def test_nothing_half_written_is_left(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any
) -> None:
    with monkeypatch.context() as deadly, pytest.raises(Killed):
        dies_at(deadly, owner, "write_state", 1, cut_off)
        begin(place, "plain", tmp_path / "run", "engine.reuse_teachers=true")
    assert len(list(tmp_path.rglob(".tmpA1b2C3"))) == 1
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(tmp_path / "run", uninterrupted(place, "plain"))
    assert not list(tmp_path.rglob(".tmp*"))


def test_killed_again_and_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uninterrupted(place, "replayed views")
    with monkeypatch.context() as deadly, pytest.raises(Killed):
        dies_at(deadly, Run, "diagnoses", 11)
        begin(place, "replayed views", tmp_path / "run", EVERY_STEP)
    for _ in range(3):
        with monkeypatch.context() as deadly, pytest.raises(Killed):
            dies_at(deadly, Run, "diagnoses", 14)
            api.resume(tmp_path / "run", quiet=True)
    api.resume(tmp_path / "run", quiet=True)
    small.assert_same(tmp_path / "run", whole)


def test_a_finished_run_is_not_run_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uninterrupted(place, "plain")
    dies_at(monkeypatch, Run, "__init__", 1)
    assert api.resume(whole).data == state.read_json(whole / "result.json")


def test_caches_are_gone_when_a_run_is_done(place: Path) -> None:
    assert not (uninterrupted(place, "replayed views") / "cache").exists()


def test_stopped_after_every_step(tmp_path: Path) -> None:
    """The log holds each line once, wherever a run was stopped; so do weights and random numbers."""

    def attempt(folder: Path, resume: bool, stop: bool) -> nn.Module:
        module = toy.Step()
        with toy.run(folder, resume=resume, log_every=3, diagnose_every=4) as run:
            run.modules = nn.ModuleDict({"student": module})
            for stage in ("one", "two"):
                if stop:
                    run.stop.set()
                fit(run, stage, [toy.turn(module)], toy.Source(), 2)
        return module

    clean = attempt(tmp_path / "clean", False, False)
    stops = 0
    while True:
        try:
            module = attempt(tmp_path / "stopped", stops > 0, True)
            break
        except Interrupted as error:
            stops += 1
            assert str(error).endswith(f"continue with: limbeck resume {tmp_path / 'stopped'}")
    assert stops == 16
    assert all(map(torch.equal, clean.state_dict().values(), module.state_dict().values()))
    assert small.lines(tmp_path / "stopped") == small.lines(tmp_path / "clean")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    class Signalled(toy.Step):
        def forward(self, batch: Batch, at: Progress) -> dict[str, torch.Tensor]:
            if at.step == 5:
                os.kill(os.getpid(), number)
            return super().forward(batch, at)

    before = signal.getsignal(number)
    module = Signalled()
    with toy.run(tmp_path) as run:
        run.meter.console.quiet = False
        run.modules = nn.ModuleDict({"student": module})
        with pytest.raises(Interrupted, match=r"stopped in one at step 6; continue with: limbeck resume "):
            fit(run, "one", [toy.turn(module)], toy.Source(), 2)
    assert capsys.readouterr().err == "stopping after this step; once more to stop at once\n"
    assert signal.getsignal(number) is before
    state = read_state(toy.checkpoints(tmp_path)[-1].with_suffix(""))
    assert state["step"] == 6
    assert torch.equal(state["modules"]["student.student.weight"], module.student.weight)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), toy.run(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    recipe, folder = small.recipe(tmp_path, "scenario.epochs=1"), tmp_path / "run"
    with Run(folder, recipe.engine, 0, quiet=True):
        (folder / "recipe.yaml").write_text("mine")
        for call in (lambda: api.run(recipe, out=folder, quiet=True), lambda: Run(folder, recipe.engine, 0)):
            with pytest.raises(ConfigError, match=r"run is in use by another process: wait for it, or name"):
                call()
        assert (folder / "recipe.yaml").read_text() == "mine"
    api.run(recipe, out=folder, quiet=True)
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "versions.json", "metrics.jsonl", "checkpoints", "result.json", "student"
    }  # fmt: skip


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    held = (
        "import os, signal; from pathlib import Path; from limbeck.engine.run import Run; "
        f"from limbeck.engine.settings import Engine; Run(Path({str(folder)!r}), Engine(), 0, quiet=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", held], check=False)
    assert killed.returncode == -signal.SIGKILL
    with Run(folder, Engine(), 0, quiet=True):
        pass


def test_a_run_that_ended_lets_go_of_its_folder_though_a_child_lives_on(tmp_path: Path) -> None:
    with Run(tmp_path / "run", Engine(device="cpu"), seed=0, quiet=True):
        child = os.fork()
        if child == 0:  # as a data loader's worker, with every file of its parent open
            signal.pause()
            os._exit(0)
    try:
        with Run(tmp_path / "run", Engine(device="cpu"), seed=0, resume=True, quiet=True) as again:
            assert again.folder == tmp_path / "run"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
