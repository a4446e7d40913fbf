"""A network of the user's own as a student."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.contracts import Net, Spec, Student
from limbeck.nets.modules import GivenModule


@dataclass(frozen=True, kw_only=True)
class ModuleStudent(GivenModule, Student):
    """Any ``torch.nn.Module`` from images to logits; all of it learns.

    Attributes:
        target: ``package.module:callable`` that returns the module, of a package named in ``LIMBECK_TRUST``;
            or, from Python, the module itself.
        kwargs: arguments for the callable.
        weights: a safetensors file of its whole state.
        images: what images it expects.
    """

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        return self.tapped(spec, generator)
