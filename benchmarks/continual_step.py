"""A continual student step against the same step as the published code takes it.

The student learns with CODA and KD prompts from labels and from a prompted teacher (KDP). As published
(arXiv 2407.13911 and the code it builds on), each step runs the query network once for the teacher and once
for the student, asks the live teacher, takes all tokens through the last blocks, and makes gradients of all
frozen weights of the student, which nothing reads. Both sides use the same modules, weights and batches;
loss and gradient are compared first.

replayed: two views of each sample in turn; query and teacher are asked once and read from the cache.
fresh: a new view of each sample in each epoch; the teacher answers live.

With ``--device cuda`` both sides are on the GPU, in float32; ``--batch 128`` gives it enough to do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from pairs import PAPER, SHIPPED, Ready, Setting, random_weights
from side_by_side import arguments, in_turn, medians, ratio, scratch_run, write
from torch import Tensor

from limbeck.contracts import Batch, Progress
from limbeck.data.batches import Batches
from limbeck.data.views import Views
from limbeck.engine.fit import Source, Turn
from limbeck.engine.run import Run
from limbeck.scenarios.pair import Pair, constants

WARMUP = 3
WHOLE = ("norm",)  # the engine takes only the tokens that are read through the last block; this asks for all
REQUIRED = {"replayed": 3.0, "fresh": 1.25}
AUGMENT: dict[str, Any] = {"scale": (0.08, 1.0), "ratio": (0.75, 4 / 3), "flip": 0.5}
Sides = dict[str, Callable[[], object]]
Window = tuple[int, int]


class Published:
    """The step as published, on copies of both networks."""

    def __init__(self, pair: Pair, window: Window, turn: Turn) -> None:
        assert pair.teacher is not None
        self.student, self.teacher = copy.deepcopy(pair.student), copy.deepcopy(pair.teacher)
        self.learned = [p for p in self.student.parameters() if p.requires_grad]
        self.backbone = self.student.get_submodule("backbone").requires_grad_(True)
        self.optimizer = turn.optim.build([{"params": self.learned}])
        self.window = window
        self.student.train()
        self.teacher.eval()

    def loss(self, batch: Batch) -> Tensor:
        """0.5 of the masked cross entropy and 0.5 of the softened divergence, T = 2."""
        with torch.no_grad():
            told = self.teacher(replace(batch, query=self.student.query(batch.inputs)), taps=WHOLE)
        said = self.student(replace(batch, query=self.student.query(batch.inputs)), taps=WHOLE)
        start, stop = self.window
        seen = said.logits[:, :stop]
        masked = torch.cat((torch.full_like(seen[:, :start], -torch.inf), seen[:, start:]), dim=1)
        labels = F.cross_entropy(masked, batch.labels)
        ours = F.log_softmax(said.soft[:, start:stop] / 2, dim=1)
        theirs = F.softmax(told.logits[:, start:stop] / 2, dim=1)
        return 0.5 * labels + 0.5 * 4 * F.kl_div(ours, theirs, reduction="batchmean")

    def step(self, batch: Batch) -> None:
        """One optimiser step; what the frozen weights received is dropped."""
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.backbone.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def endless(source: Source, device: torch.device) -> Iterator[Batch]:
    """Epoch after epoch, on the device."""
    return (batch.to(device) for epoch in count() for batch in source.epoch(epoch))


def agree(turn: Turn, published: Published, batch: Batch) -> dict[str, float]:
    """Largest relative differences of loss and gradient; stops where they are too large."""
    turn.module.train()
    terms = turn.module(batch, Progress())
    ours, theirs = torch.stack(list(terms.values())).sum(), published.loss(replace(batch, query=None))
    named = [n for n, p in published.student.named_parameters() if any(p is q for q in published.learned)]
    own = dict(turn.module.get_submodule("student").named_parameters())
    mine = torch.autograd.grad(ours, [own[n] for n in named])
    other = torch.autograd.grad(theirs, published.learned)
    loss = float((ours - theirs).detach().abs() / theirs.detach().abs())
    gradient = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(mine, other, strict=True)
    )
    assert loss < 1e-5 and gradient < 1e-4, f"loss differs by {loss}, gradient by {gradient}"
    return {"loss": loss, "gradient": gradient}


def sides(ready: Ready, batches: Batches) -> tuple[Sides, dict[str, float]]:
    """The engine's step and the published one over the same batches, and how far they differ."""
    pair, optim = ready.pair, ready.recipe.scenario.optim
    captured = pair.captured_teacher(batches, epochs=1000)
    ask = pair.ask_live if captured is None else pair.remembered(captured)
    turn = Turn("student", pair.distillation(ready.window, ask), optim, constants(pair.nets()))
    source, published = pair.source(batches), Published(pair, ready.window, turn)
    device = pair.run.device
    seen = agree(turn, published, next(endless(source, device)))
    ours, theirs = endless(source, device), endless(batches, device)
    at = Progress(step=5, steps=1000, epochs=20)  # a step that is not among those that are diagnosed
    return {
        "engine": lambda: turn.step(next(ours), at, pair.run),
        "published": lambda: published.step(next(theirs)),
    }, seen


def measure(run: Run, setting: Setting, repeats: int) -> dict[str, Any]:
    """Both kinds of views of one pair of networks."""
    ready = setting.build(run)
    rows = {}
    for kind, views in {"replayed": Views(count=2, **AUGMENT), "fresh": Views(**AUGMENT)}.items():
        steps, seen = sides(ready, ready.batches(views))
        times = in_turn(steps, repeats, WARMUP)
        rows[kind] = {
            "faster": ratio(times, "published", "engine"), "required": REQUIRED[kind],
            "ms": medians(times), "difference": seen,
        }  # fmt: skip
    return ready.shape() | rows


def main() -> None:
    """Measure the pair of the paper's sizes and the shipped one."""
    parser = arguments(__doc__, 15, "continual_step.json")
    parser.add_argument(
        "--image", type=int, default=96, help="side of the paper pair's images in pixels (96)"
    )
    parser.add_argument("--batch", type=int, default=16, help="samples of its step (16)")
    given = parser.parse_args()
    sets = random_weights("vit_small_patch16_224", "vit_base_patch16_224")
    paper = Setting(PAPER, sets, given.image, given.batch, 4 * given.batch)
    shipped = Setting(SHIPPED, given.set, 28, 50, 250)
    figures = []
    for setting, repeats in ((paper, given.repeats), (shipped, 10 * given.repeats)):
        with scratch_run(given.threads, given.device) as run:
            figures.append(measure(run, setting, repeats))
    write(given.out, given.repeats, figures)


if __name__ == "__main__":
    main()
