"""ResNets for images of 32 px."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.contracts import Net, Spec, Student
from limbeck.errors import ConfigError
from limbeck.nets.backbones import InputSpec, seeded
from limbeck.nets.modules import load_weights
from limbeck.nets.small import CifarResNet
from limbeck.nets.taps import Tapped

CIFAR = InputSpec(channels=3, size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class CifarResNetStudent(Student):
    """The ResNets for CIFAR; taps are ``layer1``, ``layer2``, ``layer3`` and ``pool``.

    Source: He et al., CVPR 2016, section 4.2.

    Attributes:
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110.
        widths: channels of the three stages; ten times these are those of a WRN-*-10.
        weights: a safetensors file of its whole state to start from.
        images: what images it expects.

    Raises:
        ConfigError: a depth that is not 6n + 2, or a width below 1.
    """

    depth: int = 20
    widths: tuple[int, int, int] = (16, 32, 64)
    weights: str | None = None
    images: InputSpec = CIFAR

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ConfigError(f"depth is {self.depth} but must be 6n + 2: 8, 14, 20, 32, 44, 56, 110")
        if any(width < 1 for width in self.widths):
            raise ConfigError(f"widths is {list(self.widths)}: allowed are widths of at least 1")

    def input_spec(self) -> InputSpec:
        """See ``Network.input_spec``."""
        return self.images

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        with seeded(generator):
            network = CifarResNet(self.depth, spec.classes, self.widths, spec.channels)
        if self.weights is not None:
            load_weights(network, self.weights, f"cifar_resnet of depth {self.depth}")
        return Tapped(network)
