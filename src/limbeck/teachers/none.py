"""No teacher: the student learns alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.contracts import Net, Spec, Teacher
from limbeck.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NoTeacher(Teacher):
    """No teacher: the student learns alone, from labels."""

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """There is nothing to build.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("teacher is none, so there is nothing to ask: name a teacher")
