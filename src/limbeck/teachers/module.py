"""A network of the user's own as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from limbeck.contracts import Net, Spec, Teacher
from limbeck.nets.backbones import InputSpec
from limbeck.nets.modules import make_module
from limbeck.nets.taps import Frozen, Tapped


@dataclass(frozen=True, kw_only=True)
class ModuleTeacher(Teacher):
    """Any ``torch.nn.Module`` from images to logits; frozen.

    Attributes:
        target: ``package.module:callable`` that returns the module, or, from Python, the module itself.
        kwargs: arguments for the callable.
        weights: a safetensors file of its whole state.
        images: what images it expects.
    """

    target: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    images: InputSpec

    def input_spec(self) -> InputSpec:
        """What images the network expects."""
        return self.images

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        network = make_module(self.target, self.kwargs, self.weights, spec, generator)
        return Frozen(Tapped(network))
