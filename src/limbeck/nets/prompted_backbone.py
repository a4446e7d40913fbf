"""What a prompted teacher and a prompted student share: the backbone and the prompt learner."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from limbeck.contracts import Spec
from limbeck.nets.backbones import InputSpec, input_spec, load_backbone
from limbeck.nets.kd_prompts import KDPrompts
from limbeck.nets.prompt_map import PromptMap
from limbeck.nets.prompted_vit import PromptedViT
from limbeck.nets.prompts import PromptLearner
from limbeck.nets.prompts.coda import CODA


@dataclass(frozen=True, kw_only=True)
class PromptedBackbone:
    """A frozen vision transformer and what prompts it; the fields are described where they are chosen."""

    backbone: str
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

    def prompted(
        self,
        spec: Spec,
        generator: torch.Generator,
        *,
        kd_prompts: KDPrompts | None = None,
        prompt_map: PromptMap | None = None,
        share: float = 0.5,
    ) -> PromptedViT:
        """The network, with a second head where one of the last arguments brings it.

        Raises:
            LimbeckError: weights that cannot be had, or parts that do not fit.
        """
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
        bank = None if kd_prompts is None else kd_prompts.build(width, depth, generator)
        return PromptedViT(
            backbone,
            prompts,
            spec.classes,
            generator=generator,
            query_dim=query_dim,
            kd_prompts=bank,
            prompt_map=prompt_map,
            share=share,
        )
