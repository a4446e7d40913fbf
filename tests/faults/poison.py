"""Give a run what it cannot live on: numbers that are none, loaders that fail, workers that die.

    python -m tests.faults.poison --out FOLDER

Each must end in one line and leave a checkpoint from before the fault; the run that is resumed without the
fault must end with the weights of the untouched one. A second process in a run's folder is refused.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.faults import procedures
from tests.faults.flips import within
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from limbeck.demonstration import spread
from limbeck.engine.run import Run
from limbeck.engine.settings import Engine

FORK = multiprocessing.get_context("fork")
BAD = 37  # the sample that is spoilt
Case = dict[str, Any]


def numbers() -> tuple[Tensor, Tensor]:
    """Inputs [96, 6] and labels [96]."""
    inputs = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    return inputs, inputs[:, :3].argmax(1)


class Items(Dataset[tuple[Tensor, Tensor]]):
    """The same one by one; something may happen where ``BAD`` is read, behind the first epoch."""

    def __init__(self, place: Path, happens: Callable[[], object] | None = None) -> None:
        self.inputs, self.labels = numbers()
        self.place, self.happens = place, happens

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        if at == BAD and self.happens is not None and any((self.place / "checkpoints").glob("*.json")):
            self.happens()
        return self.inputs[at], self.labels[at]


def fails() -> None:
    raise OSError("this sample is gone")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def loader(items: Items) -> dict[str, Any]:
    """Two workers that read ``items``."""
    draws = torch.Generator()
    return {"train": DataLoader(items, batch_size=16, shuffle=True, num_workers=2, generator=draws)}


class Spoilt(nn.Module):
    """A network whose answer to one input is no number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.network, self.value = perceptron(1, 32), value

    def forward(self, inputs: Tensor) -> Tensor:
        bad = (inputs == numbers()[0][BAD]).all(1, keepdim=True)
        said: Tensor = self.network(inputs)
        return said.masked_fill(bad, self.value)


def perceptron(seed: int, width: int) -> nn.Sequential:
    """Numbers [B, 6] to logits [B, 3]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def bad_gradients() -> nn.Module:
    """A student whose gradients are spoilt in the tenth step."""
    student, steps = perceptron(2, 8), iter(range(10**6))
    student[0].weight.register_hook(lambda grad: grad * float("nan") if next(steps) == 9 else grad)
    return student


def spoilt_data(value: float) -> dict[str, Any]:
    inputs, labels = numbers()
    inputs[BAD, 2] = value
    return {"train": (inputs, labels)}


def faults(place: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What ``distill`` is given with the fault, and without it."""
    nan, inf = float("nan"), float("inf")
    clean = {"train": numbers(), "student": perceptron(2, 8)}
    taught = {"teacher": perceptron(1, 32), "engine": engine(place, cache=False)}
    loaded = {**loader(Items(place)), "student": perceptron(2, 8)}
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for name, value in (("NaN", nan), ("an infinity", inf)):
        found[f"{name} in the data"] = ({**clean, **spoilt_data(value)}, clean)
        spoilt = {**clean, **taught, "teacher": Spoilt(value)}
        found[f"{name} in the teacher"] = (spoilt, {**clean, **taught, "teacher": wrapped()})
    found["NaN in the gradient"] = ({**clean, "student": bad_gradients()}, clean)
    found["a data set that raises"] = (
        {**clean, "train": Items(place, fails)},
        {**clean, "train": Items(place)},
    )
    found["a loader that raises in a worker"] = ({**loaded, **loader(Items(place, fails))}, loaded)
    found["a loader's worker that dies"] = ({**loaded, **loader(Items(place, dies))}, loaded)
    return found


def wrapped() -> nn.Module:
    """The teacher that is spoilt elsewhere, with weights of the same names, sound."""
    sound = Spoilt(0.0)
    sound.forward = sound.network.forward  # type: ignore[method-assign]
    return sound


def engine(place: Path, **more: Any) -> Engine:
    return Engine(threads=1, checkpoint_seconds=0, cache_root=str(place.with_suffix(".caches")), **more)


def poisoned(root: Path, name: str, number: int) -> Case:
    """What came of one of ``faults``."""
    place, whole = root / f"{number}", root / f"{number} whole"
    procedures.plain_modules(whole, root / "caches", **faults(whole)[name][1])
    bad, good = faults(place)[name]
    began = time.monotonic()
    ended, said = within(lambda: procedures.plain_modules(place, root / "caches", **bad))
    seconds = time.monotonic() - began
    stood = procedures.progress(place) if (place / "checkpoints").exists() else None
    again, told = within(lambda: procedures.plain_modules(place, root / "caches", changed=True, **good))
    equal = again == "done" and weights(place) == weights(whole)
    print(name, ended, again, equal, f"{time.monotonic() - began:.0f} s", flush=True)
    return {
        "fault": name, "said": said.replace(str(root), ""), "one line": ended == "refused",
        "seconds": round(seconds, 1), "stood at": stood, "equal when resumed": equal,
        "told": "" if equal else told,
    }  # fmt: skip


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


def dying(number: int) -> int:
    if number == 1:
        dies()
    time.sleep(0.2)
    return number


def jobs() -> Case:
    """One of the processes of ``demonstrate --jobs`` is killed."""
    began = time.monotonic()
    ended, said = within(lambda: list(spread(dying, range(8), 2)))
    return {
        "fault": "a process of demonstrate --jobs that is killed",
        "said": said, "one line": ended == "refused",
        "seconds": round(time.monotonic() - began, 1), "equal when resumed": True,
    }  # fmt: skip


def crowded(root: Path) -> Case:
    """A second process in the folder of a run, and a third when the first was killed."""
    folder = root / "crowded"

    def hold() -> None:
        with Run(folder, Engine(), 0, quiet=True):
            theirs.send("in")
            time.sleep(600)

    ours, theirs = FORK.Pipe()
    first = FORK.Process(target=hold)
    first.start()
    ours.recv()
    ended, said = within(lambda: Run(folder, Engine(), 0, quiet=True))
    os.kill(first.pid or 0, signal.SIGKILL)
    first.join()
    again, _ = within(lambda: Run(folder, Engine(), 0, quiet=True))
    return {
        "fault": "a second process in the run's folder", "said": said.replace(str(root), ""),
        "one line": ended == "refused", "seconds": 0.0, "equal when resumed": again == "done",
    }  # fmt: skip


def carry_out(out: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Do all this, or ``names`` of it; write ``poison.json``."""
    procedures.quick()
    began = time.monotonic()
    with procedures.workplace() as root:
        chosen = [name for name in faults(root) if names is None or name in names]
        cases = [poisoned(root, name, number) for number, name in enumerate(chosen)]
        cases += [jobs(), crowded(root)]
    shown = ("fault", "one line", "seconds", "equal when resumed", "said")
    found = {
        "what": "What a run cannot live on. Each ended in the line that is shown; resumed without the fault, "
        "the run ended with the weights of the untouched one.",
        "holds": all(case["one line"] and case["equal when resumed"] for case in cases),
        "command": "python -m tests.faults.poison --out FOLDER",
        "seconds": round(time.monotonic() - began),
        "table": [{key: case[key] for key in shown} for case in cases],
        "cases": cases,
    }  # fmt: skip
    procedures.write(out, "poison", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    if not carry_out(parser.parse_args().out)["holds"]:
        raise SystemExit("a fault was not met as it should be")


if __name__ == "__main__":
    main()
