"""Distilling one plain module into another, from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from limbeck import config, plain
from limbeck.api import RUNS, Result, finish
from limbeck.contracts import Net, Objective, Spec
from limbeck.data.samples import Loader, Samples
from limbeck.engine.optim import Optim
from limbeck.engine.ranks import here, together
from limbeck.engine.run import Run
from limbeck.engine.seeds import derive
from limbeck.engine.settings import Engine
from limbeck.engine.state import write_text
from limbeck.errors import ConfigError, DataError
from limbeck.nets.taps import Frozen, Tapped
from limbeck.scenarios.fit_together import check_objectives
from limbeck.scenarios.pair import Pair
from limbeck.scenarios.static import Static
from limbeck.selectors.all import All
from limbeck.teachers.none import NoTeacher

Data = tuple[Tensor, Tensor] | Dataset[Any] | DataLoader[Any]


@together()
def distill(
    teacher: nn.Module | None,
    student: nn.Module,
    train: Data,
    *,
    test: Data | None = None,
    objective: str | Sequence[str | dict[str, Any] | Objective] = ("labels", "kd"),
    epochs: int = 20,
    batch_size: int = 64,
    optim: Optim | None = None,
    engine: Engine | None = None,
    fresh: bool = False,
    out: str | Path = RUNS / "distill",
    seed: int = 0,
    resume: bool = False,
    changed: bool = False,
    quiet: bool = False,
) -> Result:
    """Distil one plain module into another; ``student`` learns in place.

    Args:
        teacher: from inputs to logits [B, C]; never changed. None = labels alone.
        student: the same; all of it that requires a gradient learns.
        train: tensors ``(inputs, labels)``, a map-style data set of such pairs, or a ``DataLoader``.
        test: the same, to measure on; None = nothing is measured.
        objective: choices by name, as maps of their fields, or built; their terms add up.
        epochs: passes over ``train``.
        batch_size: samples per step; a loader brings its own.
        optim: the optimiser; None = Adam, 1e-3, cosine.
        engine: settings of the machine.
        fresh: a data set whose samples differ each time they are read; else the teacher is asked once
            for each sample and its answers are kept.
        out: the run's folder.
        seed: of all randomness.
        resume: go on with the run in ``out``, from the same networks and data.
        changed: go on though the call, the data or the teacher is not what the run began with.
        quiet: show no progress, only warnings.

    Raises:
        LimbeckError: parts that do not fit, a folder in use, or a training that went wrong.
    """
    folder = Path(out)
    if here().told((folder / "metrics.jsonl").exists()) and not resume:  # the first rank soon writes one
        raise ConfigError(f"{folder} holds a run: pass resume=True to go on with it, or another out")
    settings = engine or Engine()
    recipe = SimpleNamespace(
        name=folder.name,
        teacher=NoTeacher() if teacher is None else Given(lambda: Frozen(Tapped(teacher))),
        student=Given(lambda: Tapped(student)),
        objective=config.objectives([objective] if isinstance(objective, str) else objective),
        selector=All(),
        views=None,
        seed=seed,
    )
    check_objectives(recipe)
    chosen = optim or Optim(schedule="cosine")
    scenario = Static(epochs=epochs, batch_size=batch_size, optim=chosen)
    source = _source(train, batch_size, derive(seed, "batches"), fresh)
    record = _record(recipe, scenario, teacher, student) | {"train": _described(source)}
    begun = resume and not changed and (folder / "recipe.yaml").exists()
    if begun and plain.read(folder / "recipe.yaml") != record:
        raise ConfigError(
            f"{folder} holds another run than this call describes: make the same call again, or pass "
            "changed=True"
        )
    with (
        _watched(folder),
        Run(folder, settings, seed, resume=resume, changed=changed, quiet=quiet) as session,
        lent(teacher),
    ):
        if session.ranks.first:
            write_text(folder / "recipe.yaml", plain.write(record))
        example = next(iter(source.epoch(0)))
        count = len(source.index) if isinstance(source, Samples) else 0
        pair = Pair(recipe, session, Spec(classes=0), example, samples=count)
        pair.agree()
        check_classes(source, pair.classes)
        if isinstance(source, Samples) and any(hasattr(o, "start") for o in pair.adapters.values()):
            pair.start("train", source.index, labels_of(source))
        keeps = source if isinstance(source, Samples) and not fresh else None
        scenario.train(pair, source, capture=keeps)
        found: dict[str, Any] = {
            "recipe": recipe.name, "scenario": "static", "seed": seed, "data": type(train).__name__,
            "protocol": scenario.protocol(recipe) | {"objective": [repr(o) for o in recipe.objective]},
            "student": {}, "teacher": None, "fidelity": None,
        }  # fmt: skip
        if test is not None:
            probe = _source(test, scenario.eval_batch_size, 0, True, shuffle=False)
            check_classes(probe, pair.classes)
            found |= scenario.measure(pair, probe, [str(c) for c in range(pair.classes)])
        return finish(folder, session, found)


@contextmanager
def _watched(folder: Path) -> Iterator[None]:
    """Says in one line that a worker of a data loader died: torch raises that wherever the program stands."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        why = " ".join(str(error).split())
        raise DataError(f"{why}; the run in {folder} can be resumed: call again with resume=True") from error


def differs(dataset: Dataset[Any]) -> bool:
    """Whether reading one sample twice gives two inputs."""
    once, again = dataset[0][0], dataset[0][0]
    return not torch.equal(torch.as_tensor(once), torch.as_tensor(again))


def check_classes(source: Samples | Loader, classes: int) -> None:
    """Raise ``DataError`` for tensor labels outside 0 .. ``classes - 1``."""
    if isinstance(source, Samples) and isinstance(source.dataset, TensorDataset):
        labels = source.dataset.tensors[1]
        if int(labels.max()) >= classes or int(labels.min()) < 0:
            raise DataError(
                f"labels span {int(labels.min())}..{int(labels.max())} but the networks give {classes} "
                f"classes: allowed are 0..{classes - 1}"
            )


def labels_of(source: Samples) -> Tensor:
    """The labels [N] of all samples; of a data set that is no ``TensorDataset`` each sample is read."""
    data = source.dataset
    if isinstance(data, TensorDataset):
        return data.tensors[1].long()
    return torch.tensor([int(data[int(i)][1]) for i in source.index])


def _described(source: Samples | Loader) -> dict[str, Any]:
    return source.describe() if isinstance(source, Samples) else {"loader": source.steps}


def _record(recipe: Any, scenario: Static, teacher: nn.Module | None, student: nn.Module) -> dict[str, Any]:
    """What a reader may know of the run; the networks themselves live in Python."""
    return {
        "name": recipe.name,
        "made_by": "limbeck.distill",
        "teacher": None if teacher is None else type(teacher).__name__,
        "student": type(student).__name__,
        "objective": config.plain_value(recipe.objective, "objective"),
        "scenario": config.plain_value(scenario, "scenario"),
        "seed": recipe.seed,
    }


@dataclass(frozen=True)
class Given:
    """A network that is there already, in the place of one to build."""

    make: Callable[[], Net]

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """The network."""
        return self.make()


@contextmanager
def lent(module: nn.Module | None) -> Iterator[None]:
    """Give a module back with the modes and gradient flags it came with."""
    modes = [] if module is None else [(part, part.training) for part in module.modules()]
    flags = [] if module is None else [(p, p.requires_grad) for p in module.parameters()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, learns in flags:
            parameter.requires_grad_(learns)


def _source(data: Data, batch_size: int, seed: int, fresh: bool, *, shuffle: bool = True) -> Samples | Loader:
    if isinstance(data, DataLoader):
        return Loader(data, seed=seed)
    dataset = TensorDataset(*data) if isinstance(data, tuple) else data
    if not fresh and not isinstance(dataset, TensorDataset) and differs(dataset):
        raise ConfigError("a sample of the data set differs each time it is read: pass fresh=True")
    return Samples(dataset, batch_size, seed=seed, shuffle=shuffle, replays=None if fresh else 1)
