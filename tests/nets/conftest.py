"""Small networks and batches for the tests of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from limbeck.contracts import Batch
from limbeck.nets.backbones import VisionTransformer, seeded
from limbeck.nets.kd_prompts import KDPrompts
from limbeck.nets.prompt_map import PromptMap
from limbeck.nets.prompted_vit import PromptedViT
from limbeck.nets.prompts import PromptLearner

WIDTH, DEPTH, CLASSES, TASKS = 24, 3, 6, 3


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def make_vit(**fields: Any) -> VisionTransformer:
    with seeded(seed(1)):
        vit = VisionTransformer(
            **{
                "img_size": 28,
                "patch_size": 7,
                "in_chans": 1,
                "embed_dim": WIDTH,
                "depth": DEPTH,
                "num_heads": 3,
                "num_classes": 0,
                **fields,
            }
        )
        for parameter in vit.parameters():  # timm starts many at 0 or 1, which would hide mistakes
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim < 4 else None
    return vit.eval()


def make_net(
    prompts: PromptLearner | None = None,
    *,
    kd: KDPrompts | None = None,
    prompt_map: PromptMap | None = None,
    vit: VisionTransformer | None = None,
    query_dim: int = WIDTH,
    tasks: int = TASKS,
    share: float = 0.5,
) -> PromptedViT:
    vit = make_vit() if vit is None else vit
    depth = len(vit.blocks)
    built = (prompts or PromptLearner()).build(query_dim, vit.embed_dim, depth, tasks, seed(2))
    bank = None if kd is None else kd.build(vit.embed_dim, depth, seed(3))
    return PromptedViT(
        vit,
        built,
        CLASSES,
        generator=seed(4),
        query_dim=query_dim,
        kd_prompts=bank,
        prompt_map=prompt_map,
        share=share,
    )


def make_batch(count: int = 4, query: torch.Tensor | None = None, start: int = 5) -> Batch:
    images = torch.rand(count, 1, 28, 28, generator=seed(start))
    ids = torch.arange(count)
    return Batch(inputs=images, labels=ids % CLASSES, index=ids, view=torch.zeros_like(ids), query=query)


@pytest.fixture
def net() -> Callable[..., PromptedViT]:
    return make_net


@pytest.fixture
def vit() -> Callable[..., VisionTransformer]:
    return make_vit


@pytest.fixture
def batch() -> Callable[..., Batch]:
    return make_batch
