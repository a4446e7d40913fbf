"""A whole stage of ``fit`` against its bound: the bare passes and the optimiser in a loop written by hand.

The bound is: teacher forward without gradient, student forward and backward, optimiser step, on the same
tensors. Before each step of ``fit`` the loop by hand takes the same one, on copies of both networks. ``fit``
does besides what it always does at its default settings: the log, the check for non-finite losses, the shares
of the gradient, the checkpoint at the end, the checksums of what is frozen.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from operator import truediv
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from pairs import SHIPPED, Given, Setting
from side_by_side import Times, arguments, medians, ratio, scratch_run, write
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Outputs, Progress
from limbeck.engine.distillation import Distillation, combine
from limbeck.engine.fit import Source, Turn, fit
from limbeck.engine.optim import Optim
from limbeck.engine.run import Run
from limbeck.nets.backbones import load_network
from limbeck.nets.taps import Frozen, Tapped
from limbeck.objectives.kd import KD
from limbeck.objectives.labels import Labels
from limbeck.scenarios.pair import constants

REQUIRED = 1.05
STEPS = 200  # of a stage; in the shipped recipe a stage has between 200 and 240
OPTIM = Optim(lr=1e-3)
KEPT = 0.5  # weight of the labels; the teacher's part has the rest
TEMPERATURE = 2.0


def by_hand(teacher: Net, student: Net, window: slice, source: Source, epochs: int) -> Iterator[None]:
    """The bound, step by step."""
    learned = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=OPTIM.lr)
    student.train()
    teacher.eval()
    for epoch in range(epochs):
        for batch in source.epoch(epoch):
            with torch.no_grad():
                told = teacher(batch).logits[:, window]
            said = student(batch)
            loss = loss_of(said, told, batch.labels - window.start, window)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def loss_of(said: Outputs, told: Tensor, labels: Tensor, window: slice) -> Tensor:
    """Cross entropy of the class head and softened divergence of the head that distils."""
    ours = F.log_softmax(said.soft[:, window] / TEMPERATURE, dim=1)
    theirs = F.log_softmax(told / TEMPERATURE, dim=1)
    soft = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return KEPT * F.cross_entropy(said.logits[:, window], labels) + (1 - KEPT) * TEMPERATURE**2 * soft


def distillation(teacher: Net, student: Net, window: slice) -> Distillation:
    """The engine's module for the same loss."""
    choices = {"labels": Labels(weight=KEPT), "kd": KD(weight=1 - KEPT, temperature=TEMPERATURE)}
    dummy = Outputs(torch.empty(1, 2))
    built = {name: choice.build(dummy, dummy) for name, choice in choices.items()}
    return Distillation(
        student, built, combine(choices), ask=lambda batch: teacher(batch),
        window=(window.start, window.stop), query=None if student.query_dim is None else student.query,
    )  # fmt: skip


class Between:
    """Batches in memory; before each is given out, the loop by hand takes its step on it.

    So both sides go through the same moments of the machine, and their clocks are kept apart.

    Attributes:
        hand: seconds of each step by hand.
        fit: seconds from a batch given out to the next one asked for.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.steps = batches, len(batches)
        self.other: Iterator[None] = iter(())
        self.hand: list[float] = []
        self.fit: list[float] = []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The same batches in each epoch."""
        for batch in self.batches[start:]:
            began = time.perf_counter()
            next(self.other)
            given = time.perf_counter()
            yield batch
            self.hand.append(given - began)
            self.fit.append(time.perf_counter() - given)


def measure(
    run: Run, teacher: Net, student: Net, window: slice, batches: list[Batch], repeats: int
) -> dict[str, Any]:
    """Whole stages of ``fit``, and beside each of its steps one by hand on copies of both networks."""
    difference = check(teacher, student, window, batches[0])
    copies, epochs = copy.deepcopy((teacher, student)), STEPS // len(batches)
    module, source = distillation(teacher, student, window), Between(batches)
    frozen = constants({"student": student}) | {"teacher": teacher}
    run.modules = nn.ModuleDict({"student": student, "teacher": teacher})
    stages: Times = {"fit": [], "bound": []}
    for number in range(repeats + 1):
        source.other, done = by_hand(*copies, window, Given(batches), epochs), len(source.hand)
        began = time.perf_counter()
        fit(run, f"stage{number}", [Turn("student", module, OPTIM, frozen)], source, epochs)
        whole, bound = time.perf_counter() - began, sum(source.hand[done:])
        if number:  # the first warms up
            stages["fit"].append(whole - bound)
            stages["bound"].append(bound)
    steps = {"fit": source.fit[STEPS:], "bound": source.hand[STEPS:]}
    return {
        "ratio": round(median(map(truediv, stages["fit"], stages["bound"])), 3), "required": REQUIRED,
        "stage_ms": medians(stages), "steps": STEPS,
        "ratio_of_step": ratio(steps, "fit", "bound"), "step_ms": medians(steps),
        "difference_of_loss": difference,
    }  # fmt: skip


def check(teacher: Net, student: Net, window: slice, batch: Batch) -> float:
    """The relative difference of both sides' losses; stops where it is too large."""
    module = distillation(teacher.eval(), student, window)
    terms = module.train()(batch, Progress())
    with torch.no_grad():
        ours, told = torch.stack(list(terms.values())).sum(), teacher(batch).logits[:, window]
        theirs = loss_of(student(batch), told, batch.labels - window.start, window)
    difference = float((ours - theirs).abs() / theirs.abs())
    assert difference < 1e-5, f"the losses differ by {difference}"
    return difference


def plain() -> tuple[Net, Net, list[Batch], dict[str, Any]]:
    """Two ordinary vision transformers on random images; the whole student learns."""
    torch.manual_seed(0)
    student = Tapped(vision_transformer(128, 6))
    teacher = Frozen(Tapped(vision_transformer(192, 8)))
    size = 16
    batches = [
        Batch(
            inputs=torch.rand(size, 3, 32, 32), labels=torch.randint(10, (size,)),
            index=torch.arange(size), view=torch.zeros(size, dtype=torch.int64),
        )
        for _ in range(5)
    ]  # fmt: skip
    said = {"pair": "plain", "image": 32, "batch": size, "student": "128 x 6", "teacher": "192 x 8"}
    return teacher, student, batches, said


def vision_transformer(width: int, depth: int) -> nn.Module:
    """Random weights, 8 x 8 patches of images of 32 px."""
    args = {"img_size": 32, "patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": 4}
    return load_network("vit_tiny_patch16_224", 10, pretrained=False, model_args=args)


def main() -> None:
    """Measure a plain pair and the shipped one."""
    given = arguments(__doc__, 5, "fit_overhead.json").parse_args()
    figures = []
    with scratch_run(given.threads) as run:
        teacher, student, batches, said = plain()
        figures.append(said | measure(run, teacher, student, slice(0, 10), batches, given.repeats))
    with scratch_run(given.threads) as run:
        ready = Setting(SHIPPED, given.set, 28, 50, 250).build(run)
        assert ready.pair.teacher is not None
        pair, window = ready.pair, slice(*ready.window)
        figures.append(
            ready.shape() | measure(run, pair.teacher, pair.student, window, ready.given(), given.repeats)
        )
    write(given.out, given.repeats, figures)


if __name__ == "__main__":
    main()
