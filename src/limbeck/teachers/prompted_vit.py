"""A frozen vision transformer that learns through prompts, and then teaches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from limbeck.contracts import Spec, Teacher
from limbeck.nets.backbones import InputSpec, input_spec, load_backbone
from limbeck.nets.prompted_vit import PromptedViT
from limbeck.nets.prompts import PromptLearner
from limbeck.nets.prompts.coda import CODA


@dataclass(frozen=True, kw_only=True)
class PromptedViTTeacher(Teacher):
    """A frozen vision transformer with task prompts; it learns in its own phase and is frozen by the engine.

    Attributes:
        backbone: a shipped network, a timm name, or ``local-dir:FOLDER``.
        weights: a local safetensors file in place of the named weights.
        pretrained: False = a random backbone, for trials only.
        blocks: keep only the first blocks of the backbone.
        normalise: give the backbone images with the mean and deviation it was trained with; False = the
            values in [0, 1] as they are, as the CODA-Prompt and CDL codes do.
        prompts: the prompt learner; None = a linear probe on the frozen backbone.
    """

    backbone: str = "limbeck-glyphs-m"
    weights: str | None = None
    pretrained: bool = True
    blocks: int | None = None
    normalise: bool = True
    prompts: PromptLearner | None = field(default_factory=CODA)

    def input_spec(self) -> InputSpec:
        """What images the backbone expects, without reading its weights."""
        spec = input_spec(self.backbone)
        if self.normalise:
            return spec
        return replace(spec, mean=(0.0,) * spec.channels, std=(1.0,) * spec.channels)

    def build(self, spec: Spec, generator: torch.Generator) -> PromptedViT:
        """See ``Network.build``. In CDL ``spec.query_dim`` is the student's width: the query is shared."""
        backbone = load_backbone(
            self.backbone,
            pretrained=self.pretrained,
            weights=self.weights,
            blocks=self.blocks,
            spec=spec,
            generator=generator,
        )
        width, depth = backbone.embed_dim, len(backbone.blocks)
        query_dim = width if spec.query_dim is None else spec.query_dim
        prompts = (self.prompts or PromptLearner()).build(query_dim, width, depth, spec.tasks, generator)
        return PromptedViT(backbone, prompts, spec.classes, generator=generator, query_dim=query_dim)
