"""A step of DFPT-KD against its bound: the same passes and the optimiser written by hand.

The bound is: original path without gradient, prompt path, student forward and backward through both,
optimiser step, on copies of the same networks and on the same tensors. The prompt path by hand calls the
teacher's stages one after another, with the blocks between them. Loss and gradient are compared first. In
``dfpt-kd-plus`` the stages of the path are its own and learn too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import arguments, in_turn, medians, ratio, scratch_run, write
from torch import Tensor, nn

from limbeck import config
from limbeck.contracts import Batch, Progress, Spec
from limbeck.engine.fit import Turn
from limbeck.engine.run import Run
from limbeck.nets.dual_path import network_in
from limbeck.scenarios.pair import Pair

REQUIRED = 1.08
TAU = 4.0
RESNETS = [
    "teacher.teacher.network={name: cifar_resnet, depth: 56}", "student={name: cifar_resnet, depth: 20}",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A pair of networks.

    Attributes:
        recipe: names both.
        sets: overrides of the recipe.
        size: side of the images in pixels.
        channels: of the images.
        batch: samples per step.
    """

    recipe: str
    sets: Sequence[str]
    size: int
    channels: int
    batch: int


def pieces(network: Any) -> tuple[Callable[[Tensor], Tensor], list[nn.Module], nn.Module]:
    """What comes before the stages, the stages, and what comes behind them but the head."""
    if hasattr(network, "stages") and isinstance(network.stages, nn.Sequential):
        return lambda x: x, list(network.stages), network.pool
    stem = nn.Sequential(network.conv1, network.bn1, network.relu)
    return stem, [network.layer1, network.layer2, network.layer3], network.pool


class ByHand:
    """The bound, on copies of all networks."""

    def __init__(self, pair: Pair, optim: Any) -> None:
        self.teacher, self.student, self.path = copy.deepcopy((pair.teacher, pair.student, pair.adapting))
        self.teacher.eval()
        self.student.train()
        self.path.train()
        own = self.path.copy
        self.original = network_in(self.teacher.inner)
        self.stem, self.stages, self.pool = pieces(self.original if own is None else network_in(own))
        scale = [{"params": list(self.student.parameters()), "lr": optim.lr}]
        scale += [{**g, "lr": optim.lr * g["lr_scale"]} for g in self.path.parameter_groups() if g["params"]]
        self.optimizer = torch.optim.Adam(scale)

    def prompted(self, x: Tensor) -> Tensor:
        """The prompt path's logits."""
        x = self.stem(x)
        for stage, block in zip(self.stages, [*self.path.blocks, None], strict=True):
            x = stage(x)
            x = x if block is None else block.fuse.conv(x + block.prompt(x))
        logits: Tensor = self.path.head(self.pool(x))
        return logits

    def loss(self, batch: Batch) -> Tensor:
        """L_P + L_S, all weights 1."""
        with torch.no_grad():
            told = self.original(batch.inputs)
        path, own = self.prompted(batch.inputs), network_in(self.student)(batch.inputs)
        t, p, s = (F.log_softmax(z / TAU, dim=1) for z in (told, path, own))

        def kd(goal: Tensor, said: Tensor) -> Tensor:
            return TAU**2 * F.kl_div(said, goal.detach(), reduction="batchmean", log_target=True)

        labels = F.cross_entropy(path, batch.labels) + F.cross_entropy(own, batch.labels)
        return labels + kd(t, p) + kd(s, p) + kd(t, s) + kd(p, s)

    def step(self, batch: Batch) -> None:
        """One step."""
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def agree(turn: Turn, hand: ByHand, batch: Batch) -> dict[str, float]:
    """Largest relative differences of loss and gradient; stops where they are too large."""
    ours = torch.stack(list(turn.module(batch, Progress()).values())).sum()
    theirs = hand.loss(batch)
    mine = torch.autograd.grad(ours, turn.parameters)
    other = torch.autograd.grad(theirs, [p for g in hand.optimizer.param_groups for p in g["params"]])
    named = sorted(float(g.norm()) for g in mine), sorted(float(g.norm()) for g in other)
    loss = float((ours - theirs).detach().abs() / theirs.detach().abs())
    gradient = max(abs(a - b) for a, b in zip(*named, strict=True)) / max(named[1])
    assert loss < 1e-5 and gradient < 1e-4, f"loss differs by {loss}, gradient by {gradient}"
    return {"loss": loss, "gradient": gradient}


def measure(run: Run, setting: Setting, repeats: int) -> dict[str, Any]:
    """Steps of both, in turn."""
    recipe = config.load(setting.recipe, ["teacher.w_ce=1", *setting.sets])
    drawn = torch.Generator().manual_seed(0)
    ids = torch.arange(setting.batch)
    shape = (setting.batch, setting.channels, setting.size, setting.size)
    batches = [
        Batch(inputs=torch.randn(shape, generator=drawn), labels=ids % 10, index=ids, view=0 * ids)
        for _ in range(4)
    ]
    pair = Pair(recipe, run, Spec(classes=10, channels=setting.channels, size=setting.size), batches[0])
    pair.teach(False)
    optim = recipe.scenario.optim
    turn = Turn("student", pair.distillation(None, pair.ask_live), optim, {})
    turn.module.train()
    hand = ByHand(pair, optim)
    seen = agree(turn, hand, batches[0])
    at = Progress(step=5, steps=1000, epochs=20)  # a step that is not among those that are diagnosed
    ours, theirs = cycle(batches), cycle(batches)
    times = in_turn(
        {"engine": lambda: turn.step(next(ours), at, run), "bound": lambda: hand.step(next(theirs))},
        repeats,
        warmup=5,
    )
    return {
        "recipe": setting.recipe, "student": type(network_in(pair.student)).__name__, "image": setting.size,
        "batch": setting.batch, "ratio": ratio(times, "engine", "bound"), "required": REQUIRED,
        "ms": medians(times), "trainable": pair.trainable(), "difference": seen,
    }  # fmt: skip


def main() -> None:
    """Measure the digits' pair and ResNet-56 into ResNet-20, each with and without copied stages."""
    given = arguments(__doc__, 60, "dfpt_step.json").parse_args()
    figures = []
    for recipe in ("dfpt-kd", "dfpt-kd-plus"):
        for setting, repeats in (
            (Setting(recipe, given.set, 8, 1, 50), 4 * given.repeats),
            (Setting(recipe, RESNETS, 32, 3, 16), given.repeats),
        ):
            with scratch_run(given.threads) as run:
                figures.append(measure(run, setting, repeats))
    write(given.out, given.repeats, figures)


if __name__ == "__main__":
    main()
