"""A small convolutional network."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.contracts import Net, Spec, Student
from limbeck.errors import ConfigError
from limbeck.nets.backbones import InputSpec, seeded
from limbeck.nets.small import ConvNet
from limbeck.nets.taps import Tapped

DIGITS = InputSpec(channels=1, size=8, mean=(0.5,), std=(0.5,))


@dataclass(frozen=True, kw_only=True)
class CNNStudent(Student):
    """A plain convolutional network; taps are ``stages.0``, ``stages.1``, ... and ``pool``.

    Attributes:
        widths: channels of the stages; every stage after the first halves height and width.
        images: what images it expects; by default the digits'.

    Raises:
        ConfigError: no stage, or a width below 1.
    """

    widths: tuple[int, ...] = (8, 16, 32)
    images: InputSpec = DIGITS

    def __post_init__(self) -> None:
        if not self.widths or any(width < 1 for width in self.widths):
            raise ConfigError(f"widths is {list(self.widths)}: allowed are one or more of at least 1")

    def input_spec(self) -> InputSpec:
        """See ``Network.input_spec``."""
        return self.images

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        with seeded(generator):
            return Tapped(ConvNet(spec.channels, self.widths, spec.classes))
