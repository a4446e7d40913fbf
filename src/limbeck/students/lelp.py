"""A student that answers in subclasses of the classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from limbeck import losses
from limbeck.contracts import Batch, Net, Outputs, Spec, Student
from limbeck.errors import ConfigError
from limbeck.nets.wrapped import Wrapped


@dataclass(frozen=True, kw_only=True)
class LELPStudent(Student):
    """Any student with several outputs for each class; a class's logit is the log of their summed exponents.

    ``logits`` are those of the classes, ``soft_logits`` [B, C * S] those of the subclasses, class by class.
    The labels reach all subclasses of their class; the objective ``lelp`` tells them apart.

    Attributes:
        network: the student.
        subclasses: S, as many as the teacher ``lelp`` makes.

    Raises:
        ConfigError: fewer than one subclass.
    """

    network: Student
    subclasses: int = 5

    def __post_init__(self) -> None:
        if self.subclasses < 1:
            raise ConfigError(f"subclasses is {self.subclasses}: allowed are values of at least 1")

    def input_spec(self) -> Any:
        """See ``Network.input_spec``."""
        return self.network.input_spec()

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        inner = self.network.build(replace(spec, classes=spec.classes * self.subclasses), generator)
        return Folded(inner, spec.classes)


class Folded(Wrapped):
    """A network of C * S outputs that answers for C classes."""

    def __init__(self, inner: Net, classes: int) -> None:
        super().__init__(inner)
        self.classes = classes

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """The inner outputs, with both kinds of logits."""
        out: Outputs = self.inner(batch, taps, teacher)
        return replace(out, logits=losses.fold(out.logits, self.classes), soft_logits=out.logits)
