"""Kernel ridge regression on the pixels, fitted in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Outputs, Spec, Student
from limbeck.errors import ConfigError
from limbeck.metrics.kernel_ridge import rbf
from limbeck.nets.backbones import InputSpec

DIGITS = InputSpec(channels=1, size=8, mean=(0.0,), std=(1.0,))
FLOOR = 1e-3  # the least share of a class: where the regression says less, its logarithm is taken of this


@dataclass(frozen=True, kw_only=True)
class KernelRidgeStudent(Student):
    """Kernel ridge regression of the one-hot classes; nothing in it learns by gradient.

    For scenario ``kernel_self_distillation``. Its logits are the logarithms of the fitted class shares, cut
    off below at 0.001; the shares themselves are the tap ``shares``.

    Attributes:
        gamma: of the kernel exp(-gamma ‖x - z‖²) between images as the network sees them, > 0.
        ridge: lambda > 0.
        images: what images it expects; by default the digits', with pixels from 0 to 1.

    Raises:
        ConfigError: gamma or ridge is not above 0.
    """

    gamma: float = 0.1
    ridge: float = 0.1
    images: InputSpec = DIGITS

    def __post_init__(self) -> None:
        for name in ("gamma", "ridge"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values above 0")

    def input_spec(self) -> InputSpec:
        """See ``Network.input_spec``."""
        return self.images

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """A machine without points yet; the generator is not drawn from."""
        return KernelMachine(self.gamma, spec.channels * spec.size**2, spec.classes)


class KernelMachine(Net):
    """f(x) = k(x, X) c.

    Attributes:
        points: X [n, d] float64; no gradient reaches it.
        duals: c [n, C] float64; likewise.
    """

    points: nn.Parameter
    duals: nn.Parameter

    def __init__(self, gamma: float, pixels: int, classes: int) -> None:
        super().__init__()
        self.gamma = gamma
        self.hold(torch.empty(0, pixels), torch.empty(0, classes))

    def hold(self, points: Tensor, duals: Tensor) -> KernelMachine:
        """Take these points [n, d] and duals [n, C]."""
        self.points = nn.Parameter(points.double(), requires_grad=False)
        self.duals = nn.Parameter(duals.double(), requires_grad=False)
        return self

    def shares(self, images: Tensor) -> Tensor:
        """What the regression says of images [B, ...]: [B, C] float64."""
        return rbf(images.flatten(1), self.points, self.gamma) @ self.duals

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """Log shares as logits [B, C] float32."""
        shares = self.shares(batch.inputs)
        return Outputs(shares.clamp(min=FLOOR).log().float(), features={"shares": shares})
