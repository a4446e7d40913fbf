"""The contracts that every wing keeps: what flows through a step, and the five choices.

Shapes: B batch, C classes, T tokens, D width. A choice is a frozen, keyword-only dataclass whose fields
are its whole configuration; what is learnable is built later, from the shapes of a dry run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from limbeck.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: all that a schedule may depend on.

    ``epoch`` counts from 0 within the stage; ``step`` counts optimiser steps from 0 within the stage.
    """

    step: int = 0
    steps: int = 1
    epoch: int = 0
    epochs: int = 1
    task: int = 0
    tasks: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step sees.

    Attributes:
        inputs: what the networks read; for images [B, channels, H, W] float in the model's range.
        labels: class ids [B] int64 in the data set's numbering.
        index: position [B] of each sample in its data set: the key of every cache.
        view: number [B] of the augmented view of each sample: the other half of that key.
        query: frozen features [B, D] that select prompts; None where nothing asks for them.
        weight: weights [B] >= 0 that the selector gave, with sum B; None = all samples count alike.
    """

    inputs: Tensor
    labels: Tensor
    index: Tensor
    view: Tensor
    query: Tensor | None = None
    weight: Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """The same batch on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None}
        )


@dataclass(frozen=True)
class Outputs:
    """What a network gave; one type for teacher and student, live or cached.

    Attributes:
        logits: [B, C] of the class head: what labels are matched with.
        soft_logits: [B, C] of a second head that learns from the teacher; None where there is one head.
        features: tapped tensors by module path.
        losses: the network's own scalar terms (prompt key matching, orthogonality), already weighted.
        prompts: the prefix prompts (key, value), each [B, L, D], by block, where a network has them.
        mask: which positions count, True = counts; None = all.
    """

    logits: Tensor
    soft_logits: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    mask: Tensor | None = None

    @property
    def soft(self) -> Tensor:
        """The logits [B, C] that distillation matches: the second head's, or else the class head's."""
        return self.logits if self.soft_logits is None else self.soft_logits

    def columns(self, start: int, stop: int) -> Self:
        """The same outputs with logits cut to the classes ``start`` .. ``stop - 1``."""
        soft = None if self.soft_logits is None else self.soft_logits[:, start:stop]
        return replace(self, logits=self.logits[:, start:stop], soft_logits=soft)

    def detach(self) -> Self:
        """The same outputs without a graph."""
        return replace(
            self,
            logits=self.logits.detach(),
            soft_logits=None if self.soft_logits is None else self.soft_logits.detach(),
            features={k: v.detach() for k, v in self.features.items()},
            losses={},
            prompts={k: (a.detach(), b.detach()) for k, (a, b) in self.prompts.items()},
        )


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective reads. Taps are module paths; ``blocks.-1`` counts from the end."""

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    teacher_logits: bool = True


@dataclass(frozen=True, slots=True)
class Spec:
    """What the data asks of a network: all that ``build`` may depend on besides the fields.

    ``query_dim`` is the width of the query that selects prompts; None = the network's own width.
    """

    classes: int
    tasks: int = 1
    channels: int = 3
    size: int = 224
    query_dim: int | None = None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is matched. Stateless objectives implement ``terms``; those that learn override ``build``."""

    def needs(self) -> Needs:
        """The taps and logits that ``terms`` will read."""
        return Needs()

    def build(self, student: Outputs, teacher: Outputs) -> nn.Module:
        """The module whose forward is ``(student, teacher, batch, at) -> terms``.

        Args:
            student: outputs of a dry run: shapes only count.
            teacher: the same of the teacher.

        Raises:
            ShapeError: the two cannot be matched.
        """
        return Stateless(self)

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """Named scalar terms, already weighted. ``batch.labels`` count from 0 in the logits' columns."""
        raise TypeError(f"{type(self).__name__} defines neither terms() nor build()")


class Stateless(nn.Module):
    """The module of an objective that has nothing to learn."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        return self.objective.terms(student, teacher, batch, at)


class Net(nn.Module):
    """A built teacher or student. A plain network overrides ``forward`` alone.

    A part that never changes and is made again from the recipe sets ``constant = True``: checkpoints
    leave it out, and the engine checks that it did not move.

    Attributes:
        query_dim: width D of the frozen features that select its prompts; None = it asks for none.
        reads_prompts: whether its forward reads the teacher's prompts, which no cache holds.
    """

    query_dim: int | None = None
    reads_prompts: bool = False

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """Outputs for ``batch`` with the features at ``taps``; ``teacher`` is what the teacher said."""
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def query(self, images: Tensor) -> Tensor:
        """Frozen features [B, query_dim] that select prompts, without gradient."""
        raise TypeError(f"{type(self).__name__} has no query")

    def predict(self, outputs: Outputs) -> Tensor:
        """The logits [B, C] that the network answers with."""
        return outputs.logits

    def start_task(self, task: int, generator: torch.Generator) -> None:
        """Get ready for task number ``task``: grow or copy what the method grows or copies."""

    def finish_task(self) -> None:
        """Settle what was learnt in the task that ends."""

    def key_accuracy(self, query: Tensor, task: int) -> Tensor | None:
        """Share of ``query`` [N, query_dim], all of ``task``, that find that task's prompts, in [0, 1].

        None where no key stands for a task.
        """
        return None

    def attach_teacher(self, teacher: Net) -> None:
        """Keep what this network needs of its teacher when it is used without one."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A teacher or a student: how to build one."""

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """The network, initialised from ``generator`` alone.

        Raises:
            LimbeckError: weights that cannot be had, or that do not fit ``spec``.
        """
        raise TypeError(f"{type(self).__name__} defines no build()")


@dataclass(frozen=True, kw_only=True)
class Teacher(Network):
    """Who teaches.

    Attributes:
        learns: whether it is trained in phases of its own, as only a stream gives them.
    """

    learns: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Student(Network):
    """Who learns."""


@dataclass(frozen=True, kw_only=True)
class Selector:
    """What counts, and how much."""

    def weights(self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress) -> Tensor | None:
        """Weights >= 0 of shape [B] that sum to B, or None where all samples count alike."""
        return None

    def indices(self, index: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        """The samples worth a step in ``epoch``: a part of ``index`` [N], in any order."""
        return index


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """How data and time arrive: a procedure of a few calls of the engine."""

    def load_student(self, recipe: Any, state: dict[str, Tensor], classes: int) -> Net:
        """The student of a finished run of ``recipe``, in evaluation mode, from its learnt ``state``."""
        raise TypeError(f"{type(self).__name__} defines no load_student()")

    def check(self, recipe: Any) -> None:
        """Preflight: raise before any weight is read if ``recipe`` cannot work."""

    def run(self, recipe: Any, run: Any) -> dict[str, Any]:
        """Carry the scenario out in ``run`` (an ``engine.run.Run``); returns the final figures."""
        raise TypeError(f"{type(self).__name__} defines no run()")


def check_width(what: str, got: int, want: int, fix: str) -> None:
    """Raise ``ShapeError`` unless ``got == want``; the message names both and the fix."""
    if got != want:
        raise ShapeError(f"{what} is {got} but must be {want}: {fix}")
