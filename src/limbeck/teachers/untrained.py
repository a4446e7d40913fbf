"""Any student's network as it starts: the control for what a teacher's knowledge adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from limbeck.contracts import Net, Spec, Student, Teacher
from limbeck.nets.taps import Frozen


@dataclass(frozen=True, kw_only=True)
class Untrained(Teacher):
    """Any network that a student can have, with random weights; frozen. It knows nothing.

    Attributes:
        network: the network, as a student would name it.
    """

    network: Student

    def input_spec(self) -> Any:
        """See ``Network.input_spec``."""
        return self.network.input_spec()

    def reads_text(self) -> bool:
        """Whether the network does."""
        return self.network.reads_text()

    def check(self, spec: Spec) -> None:
        """Whether the network can be built."""
        self.network.check(spec)

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        return Frozen(self.network.build(spec, generator))
