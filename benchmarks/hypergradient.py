"""What TGeo-KD's outer step costs beside a plain step, and influences beside an epoch, by network size.

Students are perceptrons of growing width on random images. The outer step unrolls one step of the student and
derives through it. Influences take one Hessian-vector product over the training samples for each step of the
solver, and then the product of every sample's gradient with the solution. All of it should grow as the plain
step does, in proportion to the number of parameters: nothing of the size of parameters squared, or samples
times parameters, is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from side_by_side import arguments, in_turn, medians, ratio, write
from torch import Tensor

from limbeck.contracts import Batch
from limbeck.engine import curvature
from limbeck.engine.curvature import Params
from limbeck.nets.small import MLP

PIXELS, CLASSES, BATCH, BATCHES = 784, 10, 64, 4
WIDTHS = (128, 256, 512, 1024)


def batch() -> Batch:
    index = torch.arange(BATCH)
    inputs = torch.randn(BATCH, 1, 28, 28)
    return Batch(inputs=inputs, labels=torch.randint(CLASSES, (BATCH,)), index=index, view=0 * index)


def sides(width: int) -> tuple[int, dict[str, Callable[[], object]]]:
    """Parameters of a student of that width, and what is timed."""
    net = MLP(PIXELS, (width, width), CLASSES)
    given, held, data = batch(), batch(), [batch() for _ in range(BATCHES)]
    alpha = torch.rand(BATCH, requires_grad=True)
    count = sum(p.numel() for p in net.parameters())
    params, vector = curvature.parameters_of(net), torch.randn(count)

    def losses(params: Params, part: Batch) -> Tensor:
        return F.cross_entropy(curvature.call(net, params, part.inputs), part.labels, reduction="none")

    def step(part: Batch = given) -> None:
        net.zero_grad()
        F.cross_entropy(net(part.inputs), part.labels).backward()

    def outer() -> None:
        own = curvature.parameters_of(net)
        after = curvature.unrolled_step((alpha * losses(own, given)).mean(), own, 0.1)
        losses(after, held).mean().backward()

    def epoch() -> None:
        for part in data:
            step(part)

    return count, {
        "step": step,
        "outer_step": outer,
        "epoch": epoch,
        "hessian_product": lambda: curvature.hessian_product(losses, params, data, vector),
        "slopes": lambda: curvature.slopes(losses, params, data, vector),
    }


def measure(width: int, repeats: int) -> dict[str, Any]:
    """One width, everything in turn."""
    count, timed = sides(width)
    times = in_turn(timed, repeats, warmup=2)
    return {
        "parameters": count,
        "outer_step_over_step": ratio(times, "outer_step", "step"),
        "hessian_product_over_epoch": ratio(times, "hessian_product", "epoch"),
        "slopes_over_epoch": ratio(times, "slopes", "epoch"),
        "ms": medians(times),
    }


def main() -> None:
    """Measure students of four widths."""
    given = arguments(__doc__, 20, "hypergradient.json").parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    write(given.out, given.repeats, [measure(width, given.repeats) for width in WIDTHS])


if __name__ == "__main__":
    main()
