"""Networks around networks, and the last linear layer of any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Course, Net, Outputs, Progress
from limbeck.errors import ConfigError, ShapeError


class Wrapped(Net):
    """A network that hands on what it is told to the one that it is built around.

    Attributes:
        inner: the network within.

    Raises:
        ConfigError: the network within has a second path that learns, which would not be asked.
    """

    def __init__(self, inner: Net) -> None:
        super().__init__()
        stands_still(inner)
        self.inner = inner
        self.query_dim, self.reads_prompts = inner.query_dim, inner.reads_prompts
        self.keeps_teacher = inner.keeps_teacher

    def query(self, images: Tensor) -> Tensor:
        """See ``Net.query``."""
        return self.inner.query(images)

    def start_task(self, task: int, generator: torch.Generator) -> None:
        """See ``Net.start_task``."""
        self.inner.start_task(task, generator)

    def prepare(self, course: Course) -> None:
        """See ``Net.prepare``."""
        self.inner.prepare(course)

    def start_step(self, at: Progress) -> None:
        """See ``Net.start_step``."""
        self.inner.start_step(at)

    def finish_task(self) -> None:
        """See ``Net.finish_task``."""
        self.inner.finish_task()

    def key_accuracy(self, query: Tensor, task: int) -> Tensor | None:
        """See ``Net.key_accuracy``."""
        return self.inner.key_accuracy(query, task)

    def attach_teacher(self, teacher: Net) -> None:
        """See ``Net.attach_teacher``."""
        self.inner.attach_teacher(teacher)


def stands_still(inner: Net) -> None:
    """Raise ``ConfigError`` where a network that another is built around has a second path that learns."""
    if inner.adapting() is not None:
        raise ConfigError(
            "a dfpt teacher stands inside another teacher, where its path is not asked: put it "
            "outermost, around that one"
        )


def last_linear(network: nn.Module, classes: int) -> nn.Linear:
    """The last linear layer of ``network`` that gives ``classes`` numbers.

    Raises:
        ShapeError: there is none.
    """
    found = [m for m in network.modules() if type(m) is nn.Linear and m.out_features == classes]
    if not found:
        raise ShapeError(
            f"{type(network).__name__} has no linear layer with {classes} outputs: take a network whose "
            "classifier is one"
        )
    return found[-1]


def embed(
    net: Net, head: nn.Linear, batch: Batch, taps: tuple[str, ...], teacher: Outputs | None
) -> tuple[Outputs, Tensor]:
    """The outputs of ``net``, and the embedding [B, D] that its classifier ``head`` read.

    Raises:
        ShapeError: the classifier reads something else than vectors.
    """
    with read_by(head) as seen:
        outputs: Outputs = net(batch, taps, teacher)
    (feature,) = seen
    if feature.ndim != 2:
        raise ShapeError(
            f"the classifier reads {list(feature.shape)} but must read embeddings [batch, width]"
        )
    return outputs, feature


@contextmanager
def read_by(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context, calls of ``module`` fill the list with what it is given."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()
