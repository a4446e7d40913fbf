"""A frozen vision transformer that learns through prompts, alone or from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.contracts import Spec, Student
from limbeck.errors import ConfigError
from limbeck.nets.kd_prompts import KDPrompts
from limbeck.nets.prompt_map import PromptMap
from limbeck.nets.prompted_backbone import PromptedBackbone
from limbeck.nets.prompted_vit import PromptedViT


@dataclass(frozen=True, kw_only=True)
class PromptedViTStudent(PromptedBackbone, Student):
    """A frozen vision transformer with task prompts, and KD prompts or mapped teacher prompts besides.

    Attributes:
        backbone: a shipped network, a timm name, or ``local-dir:FOLDER``.
        weights: a local safetensors file in place of the named weights.
        pretrained: False = a random backbone, for trials only.
        blocks: keep only the first blocks of the backbone.
        normalise: give the backbone images with the mean and deviation it was trained with; False = the
            values in [0, 1] as they are, as the CODA-Prompt and CDL codes do.
        prompts: the prompt learner; None = a linear probe on the frozen backbone.
        kd_prompts: KD token and KD prompts with their own head (v2, v3, v4 of CDL); None = off.
        prompt_map: mapped teacher prompts with their own head (v1 of CDL); None = off.
        share: weight of the second head in the prediction: CDL's alpha, 0.5.
    """

    backbone: str = "limbeck-glyphs-s"
    kd_prompts: KDPrompts | None = None
    prompt_map: PromptMap | None = None
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share is {self.share} but must be from 0 to 1")
        if self.kd_prompts is not None and self.prompt_map is not None:
            raise ConfigError("kd_prompts and prompt_map both bring the second head: choose one of them")

    def build(self, spec: Spec, generator: torch.Generator) -> PromptedViT:
        """See ``Network.build``."""
        return self.prompted(
            spec, generator, kd_prompts=self.kd_prompts, prompt_map=self.prompt_map, share=self.share
        )
