"""Losses, forward and backward, against torchdistill's on the same tensors.

Value and gradient are compared first, where both compute the same. torchdistill's SP does not: it divides the
rows of its similarities by their sums, not by their lengths. And limbeck has no PKT: its nearest relative SP,
which also matches how alike the samples of a batch are, stands against that.

torchdistill is no requirement of limbeck. It is read from PYTHONPATH, where

    pip install torchdistill==1.1.5 --no-deps --target FOLDER

has put it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from side_by_side import arguments, in_turn, medians, ratio, write
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Facts, Outputs
from limbeck.objectives.crd import CRD

try:
    from torchdistill.losses import mid_level as peer
except ImportError as missing:
    raise SystemExit(f"{missing}: {(__doc__ or '').split('limbeck. ')[-1]}") from None

WARMUP = 3
REQUIRED = 1.0  # no loss may take longer than its peer
UNLIKE = ("SP", "PKT")
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """How large a batch and its features are.

    Attributes:
        batch: samples.
        classes: of the logits.
        map: channels and side of the feature maps.
        width: of the vectors.
        memory: samples that CRD remembers, and negatives for each of the batch.
    """

    batch: int
    classes: int
    map: tuple[int, int]
    width: int
    memory: tuple[int, int]


SHAPES = {
    "small": Shape(32, 10, (32, 8), 64, (1000, 256)),
    "CIFAR-100": Shape(64, 100, (128, 16), 256, (50_000, 4096)),
    "ImageNet": Shape(256, 1000, (256, 14), 512, (100_000, 1024)),
}


def through(name: str, module: torch.nn.Module, **extra: Tensor) -> Loss:
    """torchdistill's loss as a function of both networks' tensors, the student's first."""

    def loss(own: Tensor, other: Tensor) -> Tensor:
        student = {name: {"output": own}, "given": {"input": extra}}
        found: Tensor = module(student, {name: {"output": other}}, extra.get("targets"))
        return found

    return loss


def pairs(shape: Shape) -> Iterator[tuple[str, tuple[Tensor, Tensor], Loss, Loss]]:
    """Each loss: its name, the tensors of student and teacher, ours, and the peer's."""
    at = ("x", "output", "x", "output")
    channels, side = shape.map
    logits, vectors = draw(shape.batch, shape.classes), draw(shape.batch, shape.width)
    maps = draw(shape.batch, channels, side, side)
    labels = torch.arange(shape.batch) % shape.classes

    def kd(own: Tensor, other: Tensor) -> Tensor:
        return 0.1 * losses.cross_entropy(own, labels) + 0.9 * losses.kl_divergence(own, other, 4.0)

    yield "KD", logits, kd, through("x", peer.KDLoss(*at, temperature=4.0, alpha=0.1), targets=labels)

    def dist(own: Tensor, other: Tensor) -> Tensor:
        inter, intra = losses.dist(own, other, 4.0)
        return 2 * inter + 2 * intra

    yield "DIST", logits, dist, through("x", peer.DISTLoss(*at, beta=2.0, gamma=2.0, tau=4.0))
    one = {"io": "output", "path": "x"}
    attention = through("x", peer.ATLoss({"only": {"teacher": one, "student": one}}))
    yield "AT", maps, losses.attention_transfer, attention
    similar = through("x", peer.SPKDLoss("x", "x", "batchmean"))
    yield "SP", maps, losses.similarity_relations, similar

    def rkd(own: Tensor, other: Tensor) -> Tensor:
        return 25 * losses.distance_relations(own, other) + 50 * losses.angle_relations(own, other)

    yield "RKD", vectors, rkd, through("x", peer.RKDLoss("x", "x", 25.0, 50.0, "mean"))
    yield "PKT", vectors, losses.similarity_relations, through("x", peer.PKTLoss(*at))
    yield "CRD", draw(shape.batch, 128, unit=True), *contrasts(shape)


def contrasts(shape: Shape) -> tuple[Loss, Loss]:
    """CRD of both from embeddings on: one start of the memory, the same negatives; it is updated too."""
    samples, negatives = shape.memory
    index = torch.randperm(samples)[: shape.batch]
    chosen = torch.randint(samples, (shape.batch, negatives + 1))
    chosen[:, 0] = index
    feature = Outputs(torch.zeros(1, 1), features={"x": torch.zeros(1, 128)})
    plan = CRD(negatives=negatives, student_tap="x", teacher_tap="x")
    ours: Any = plan.build(feature, feature, Facts(samples=samples))
    theirs = peer.CRDLoss("x", "given", "x", 128, samples, negatives, samples)
    theirs.memory_v1.copy_(ours.student_memory)
    theirs.memory_v2.copy_(ours.teacher_memory)

    def contrast(own: Tensor, other: Tensor) -> Tensor:
        fits = ours.fits(own, other, chosen)
        loss = torch.stack([losses.noise_contrast(side, samples) for side in fits]).sum()
        ours.remember(own, other, index)
        return loss

    return contrast, through("x", theirs, pos_idx=index, contrast_idx=chosen)


def draw(*shape: int, unit: bool = False) -> tuple[Tensor, Tensor]:
    """The tensors of student and teacher."""
    drawn = [torch.randn(shape) for _ in range(2)]
    own, other = (torch.nn.functional.normalize(x, dim=1) if unit else x for x in drawn)
    return own.requires_grad_(), other


def both(loss: Loss, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A value and its gradient with respect to the student's tensor."""
    value = loss(*given)
    (grad,) = torch.autograd.grad(value.sum(), given[0])
    return value.detach().sum(), grad


def main() -> None:
    """Time each loss at each shape."""
    given = arguments(__doc__, 30, "losses.json").parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    figures: list[dict[str, Any]] = []
    for title, shape in SHAPES.items():
        for name, tensors, ours, theirs in pairs(shape):
            if name not in UNLIKE:
                for own, other in zip(both(ours, tensors), both(theirs, tensors), strict=True):
                    torch.testing.assert_close(own, other.reshape(own.shape), rtol=1e-3, atol=1e-5)
            sides = {"limbeck": partial(both, ours, tensors), "torchdistill": partial(both, theirs, tensors)}
            times = in_turn(sides, given.repeats, WARMUP)
            figures.append({
                "loss": name, "shape": title, "ratio": ratio(times, "limbeck", "torchdistill"),
                "required": REQUIRED, "ms": medians(times),
            })  # fmt: skip
    write(given.out, given.repeats, figures)


if __name__ == "__main__":
    main()
