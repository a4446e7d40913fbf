"""Any student's network as a teacher: it learns the labels in a phase of its own, then stands still."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from limbeck.contracts import Net, Spec, Student, Teacher


@dataclass(frozen=True, kw_only=True)
class Trained(Teacher):
    """Any network that a student can have, trained on labels in the same run before it teaches.

    Attributes:
        learns: it does.
        network: the network, as a student would name it.
        data: what it is trained on; None = the student's data. Its classes may be others where no objective
            matches logits.
    """

    learns: ClassVar[bool] = True

    network: Student
    data: Any | None = None

    def lessons(self) -> Any:
        """See ``Teacher.lessons``."""
        return self.data

    def input_spec(self) -> Any:
        """What images the network expects."""
        return self.network.input_spec()

    def reads_text(self) -> bool:
        """Whether the network does."""
        return self.network.reads_text()

    def tokenizer(self) -> Any:
        """That of the network."""
        return self.network.tokenizer()

    def check(self, spec: Spec) -> None:
        """Whether the network can be built."""
        self.network.check(spec)

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        return self.network.build(spec, generator)
