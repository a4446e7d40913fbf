"""A small perceptron."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.contracts import Net, Spec, Student
from limbeck.errors import ConfigError
from limbeck.nets.backbones import InputSpec, seeded
from limbeck.nets.small import MLP
from limbeck.nets.taps import Tapped

DIGITS = InputSpec(channels=1, size=8, mean=(0.5,), std=(0.5,))


@dataclass(frozen=True, kw_only=True)
class MLPStudent(Student):
    """A perceptron on the pixels; taps are ``hidden.0``, ``hidden.1``, ...

    Attributes:
        hidden: widths of the hidden layers.
        images: what images it expects; by default the digits'.

    Raises:
        ConfigError: a width below 1.
    """

    hidden: tuple[int, ...] = (64, 64)
    images: InputSpec = DIGITS

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"hidden is {list(self.hidden)}: allowed are widths of at least 1")

    def input_spec(self) -> InputSpec:
        """See ``Network.input_spec``."""
        return self.images

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        with seeded(generator):
            return Tapped(MLP(spec.channels * spec.size**2, self.hidden, spec.classes))
