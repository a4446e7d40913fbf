"""Any student's network with trained weights as a frozen teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.contracts import Net, Spec, Student, Teacher
from limbeck.nets.backbones import InputSpec
from limbeck.nets.modules import load_weights
from limbeck.nets.taps import Frozen, core


@dataclass(frozen=True, kw_only=True)
class NetworkTeacher(Teacher):
    """Any network that a student can have, with weights from a file; frozen.

    What an earlier run saved as ``student/model.safetensors`` fits the network of that run's student.

    Attributes:
        network: the network, as a student would name it.
        weights: a safetensors file of its whole state.
    """

    network: Student
    weights: str

    def input_spec(self) -> InputSpec:
        """See ``Network.input_spec``."""
        form: InputSpec = self.network.input_spec()
        return form

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        net = self.network.build(spec, generator)
        load_weights(core(net), self.weights, type(self.network).__name__)
        return Frozen(net)
