"""A frozen vision transformer that learns through prompts, and then teaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from limbeck.contracts import Spec, Teacher
from limbeck.nets.prompted_backbone import PromptedBackbone
from limbeck.nets.prompted_vit import PromptedViT


@dataclass(frozen=True, kw_only=True)
class PromptedViTTeacher(PromptedBackbone, Teacher):
    """A frozen vision transformer with task prompts; it learns in its own phase and is frozen by the engine.

    Attributes:
        learns: it does.
        backbone: a shipped network, a timm name, or ``local-dir:FOLDER``.
        weights: a local safetensors file in place of the named weights.
        pretrained: False = a random backbone, for trials only.
        blocks: keep only the first blocks of the backbone.
        normalise: give the backbone images with the mean and deviation it was trained with; False = the
            values in [0, 1] as they are, as the CODA-Prompt and CDL codes do.
        prompts: the prompt learner; None = a linear probe on the frozen backbone.
    """

    learns: ClassVar[bool] = True

    backbone: str = "limbeck-glyphs-m"

    def build(self, spec: Spec, generator: torch.Generator) -> PromptedViT:
        """See ``Network.build``. In CDL ``spec.query_dim`` is the student's width: the query is shared."""
        return self.prompted(spec, generator)
