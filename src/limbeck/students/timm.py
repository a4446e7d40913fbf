"""Any network of timm as a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from limbeck.contracts import Net, Spec, Student
from limbeck.nets.backbones import InputSpec, describe, load_network, network_input
from limbeck.nets.taps import Tapped


@dataclass(frozen=True, kw_only=True)
class TimmStudent(Student):
    """Any network of timm; all of it learns.

    Attributes:
        model: a timm name, a shipped network, or ``local-dir:FOLDER``.
        pretrained: start from the named weights; the classifier starts anew unless it fits the classes.
        weights: a local safetensors file in place of the named weights.
        model_args: arguments for ``timm.create_model``, such as ``img_size`` and ``in_chans``.
    """

    model: str
    pretrained: bool = False
    weights: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)

    def input_spec(self) -> InputSpec:
        """What images the network expects, without reading its weights."""
        return network_input(self.model, self.model_args)

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        network = load_network(
            self.model,
            spec.classes,
            pretrained=self.pretrained,
            weights=self.weights,
            model_args=self.model_args,
            spec=spec,
            new_head=True,
            generator=generator,
        )
        tapped = Tapped(network)
        tapped.description = describe(self.model, self.model_args, network)
        return tapped
