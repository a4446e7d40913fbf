"""Epochs of KD, ResNet-110 into ResNet-20, against the same epochs in torchdistill's own training loop.

Both sides train copies of torchdistill's networks on the same tensors with SGD, and the loss of a batch is
compared first. torchdistill's side is the loop of its examples without its log, its teacher in evaluation
mode and without gradients. limbeck's is a whole stage of ``fit``, with log, guards and checkpoint.

live: the teacher answers each batch.
cached: the teacher is asked once for each image; what is timed are the epochs after the first.

torchdistill is no requirement of limbeck. It is read from PYTHONPATH, where

    pip install torchdistill==1.1.5 --no-deps --target FOLDER

has put it.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from side_by_side import Times, arguments, medians, ratio, scratch_run, write
from torch import nn
from torch.utils.data import TensorDataset

from limbeck import config
from limbeck.contracts import Batch, Progress, Spec
from limbeck.data.samples import Samples
from limbeck.distilling import Given
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.nets.taps import Frozen, Tapped
from limbeck.scenarios.pair import Pair
from limbeck.scenarios.static import Static
from limbeck.selectors.all import All

try:
    from torchdistill.core.distillation import DistillationBox
    from torchdistill.models.classification.resnet import resnet20, resnet110
except ImportError as missing:
    raise SystemExit(f"{missing}: {(__doc__ or '').split('limbeck. ')[-1]}") from None

REQUIRED = {"live": 1.0, "cached": 0.5}
IMAGES, BATCH, CLASSES, EPOCHS = 256, 64, 100, 12
RATE = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
WEIGHT, TEMPERATURE = 0.9, 4.0


def torchdistill_box(teacher: nn.Module, student: nn.Module, data: TensorDataset) -> Any:
    """torchdistill's training of ``student``, as a recipe of its own says it."""
    at = {f"{who}_module_{what}": value for who in ("student", "teacher")
          for what, value in (("path", "."), ("io", "output"))}  # fmt: skip
    kd = {"key": "KDLoss", "kwargs": at | {"temperature": TEMPERATURE, "alpha": 1 - WEIGHT}}
    plan = {
        "num_epochs": EPOCHS,
        "train_data_loader": {
            "dataset_id": "train", "sampler": {"class_or_func": torch.utils.data.RandomSampler},
            "kwargs": {"batch_size": BATCH, "num_workers": 0},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": dict(RATE)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}},
        },
    }  # fmt: skip
    box = DistillationBox(teacher, student, {"train": data}, plan, torch.device("cpu"), None, False, 1.0)
    box.teacher_model.eval()
    return box


def torchdistill_epochs(box: Any) -> list[float]:
    """Seconds of each epoch."""
    seconds = []
    for epoch in range(EPOCHS):
        began = time.perf_counter()
        box.pre_epoch_process(epoch=epoch)
        for images, labels, extra in box.train_data_loader:
            box.post_forward_process(box.forward_process(images, labels, extra))
        seconds.append(time.perf_counter() - began)
    return seconds


class Clocked:
    """A source that notes when each epoch begins."""

    def __init__(self, source: Samples) -> None:
        self.source, self.steps = source, source.steps
        self.began: list[float] = []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of the source."""
        self.began.append(time.perf_counter())
        yield from self.source.epoch(epoch, start)


def limbeck_pair(run: Run, teacher: nn.Module, student: nn.Module, samples: Samples) -> Pair:
    """Both networks in one run of limbeck."""
    recipe = SimpleNamespace(
        name="kd", seed=0, views=None, selector=All(),
        teacher=Given(lambda: Frozen(Tapped(teacher))), student=Given(lambda: Tapped(student)),
        objective=config.objectives([
            {"name": "labels", "weight": 1 - WEIGHT},
            {"name": "kd", "weight": WEIGHT, "temperature": TEMPERATURE},
        ]),
    )  # fmt: skip
    pair = Pair(recipe, run, Spec(classes=CLASSES), next(iter(samples.epoch(0))))
    pair.teach(False)
    return pair


def limbeck_epochs(
    threads: int, teacher: nn.Module, student: nn.Module, data: TensorDataset, *, cached: bool
) -> list[float]:
    """Seconds of each epoch of a stage."""
    plan = Static(epochs=EPOCHS, batch_size=BATCH, optim=Optim(name="sgd", schedule="constant", **RATE))
    with scratch_run(threads) as run:
        samples = Samples(data, BATCH)
        clock = Clocked(samples)
        plan.train(limbeck_pair(run, teacher, student, samples), clock, capture=samples if cached else None)
        marks = [*clock.began, time.perf_counter()]
    return [after - before for before, after in pairwise(marks)]


def check_alike(threads: int, teacher: nn.Module, student: nn.Module, data: TensorDataset) -> None:
    """Compare loss and gradient of both on one batch."""
    samples = Samples(data, BATCH)
    batch = next(iter(samples.epoch(0)))
    box = torchdistill_box(copy.deepcopy(teacher), copy.deepcopy(student), data)
    box.pre_epoch_process(epoch=0)
    theirs = box.forward_process(batch.inputs, batch.labels, {})
    theirs.backward()
    own = copy.deepcopy(student)
    with scratch_run(threads) as run:
        pair = limbeck_pair(run, copy.deepcopy(teacher), own, samples)
        own.train()
        ours = torch.stack(list(pair.distillation(None, pair.ask_live)(batch, Progress()).values())).sum()
        ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, other in zip(own.parameters(), box.student_model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-2, atol=1e-4)


def main() -> None:
    """Time whole trainings in turn, each from the same start."""
    given = arguments(__doc__, 3, "kd_epoch.json").parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    teacher, student = resnet110(CLASSES), resnet20(CLASSES)
    data = TensorDataset(torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES) % CLASSES)
    check_alike(given.threads, teacher, student, data)
    times: Times = {"torchdistill": [], "live": [], "cached": []}
    for _ in range(given.repeats):
        times["torchdistill"] += torchdistill_epochs(torchdistill_box(teacher, copy.deepcopy(student), data))
        for name in REQUIRED:
            pupil = copy.deepcopy(student)
            seconds = limbeck_epochs(given.threads, teacher, pupil, data, cached=name == "cached")
            times[name] += seconds[name == "cached" :]
    figures = [
        {
            "side": name, "pair": "ResNet-110, ResNet-20", "image": 32, "batch": BATCH, "images": IMAGES,
            "ratio": ratio(times, name, "torchdistill"), "required": required,
        }
        for name, required in REQUIRED.items()
    ]  # fmt: skip
    figures.append({"side": "all", "epoch_ms": medians(times)})
    write(given.out, given.repeats, figures)


if __name__ == "__main__":
    main()
