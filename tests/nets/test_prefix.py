"""Prefix attention against timm, and against the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from limbeck.contracts import Batch
from limbeck.errors import ShapeError
from limbeck.nets.backbones import VisionTransformer, timm
from limbeck.nets.prefix import (
    Additive,
    Attention,
    ResPostBlock,
    halves,
    prefix_attention,
    prompted_block,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4},
    "layer scale": {"init_values": 0.1},
    "norm of queries and keys": {"qk_norm": True},
    "class token without position": {"no_embed_class": True, "reg_tokens": 2},
    "post-norm blocks": {"block_fn": ResPostBlock},
    "inner norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "norm before": {"pre_norm": True},
    "attention pooling": {"global_pool": "map"},
    "no bias": {"qkv_bias": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_without_prompts_equals_timm_bit_for_bit(name: str, net: Any, vit: Any, batch: Any) -> None:
    backbone: VisionTransformer = vit(**VARIANTS[name])
    bare, data = net(vit=backbone).train(), batch()
    said = bare(data, taps=("norm", "blocks.1"))
    assert torch.equal(said.features["norm"], backbone.forward_features(data.inputs))
    assert torch.equal(said.logits, bare.head(backbone(data.inputs)))
    assert torch.equal(bare.query(data.inputs), backbone(data.inputs))


@pytest.mark.parametrize("arch", ["test_vit", "test_vit2", "test_vit3", "deit_tiny_distilled_patch16_224"])
def test_without_prompts_equals_timms_own_architectures(arch: str, net: Any) -> None:
    backbone = timm.create_model(arch, pretrained=False, num_classes=0).eval()
    size = backbone.pretrained_cfg["input_size"]
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(2)
    bare = net(vit=backbone, query_dim=backbone.embed_dim)
    said = bare(Batch(inputs=images, labels=ids, index=ids, view=ids))
    assert torch.equal(said.logits, bare.head(backbone(images)))


@pytest.mark.parametrize("name", VARIANTS)
def test_our_block_with_nothing_in_it_is_timms(name: str, vit: Any) -> None:
    block = vit(**VARIANTS[name]).blocks[0]
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(9, 9, dtype=torch.bool)
    assert torch.allclose(prompted_block(block, x, mask=everything), block(x), rtol=1e-5, atol=1e-6)


@pytest.fixture
def attn() -> Attention:
    torch.manual_seed(0)
    return Attention(12, num_heads=3, qkv_bias=True).double().eval()


def rows(*shape: int, start: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(start))


def test_is_the_softmax_over_prompts_and_tokens(attn: Attention) -> None:
    x, keys, values = rows(2, 5, 12, start=1), rows(2, 3, 12, start=2), rows(2, 3, 12, start=3)
    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    k, v = torch.cat((keys, k), 1), torch.cat((values, v), 1)
    heads = [
        torch.softmax(q[..., h] @ k[..., h].mT / 2, -1) @ v[..., h]
        for h in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    want = attn.proj(torch.cat(heads, -1))
    assert torch.allclose(prefix_attention(attn, x, [(keys, values)]), want)


def test_joint_order_of_keys_and_values_does_not_matter_but_their_roles_do(attn: Attention) -> None:
    x, keys, values = rows(2, 5, 12, start=1), rows(2, 4, 12, start=2), rows(2, 4, 12, start=3)
    y = prefix_attention(attn, x, [(keys, values)])
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(prefix_attention(attn, x, [(keys[:, order], values[:, order])]), y)
    split = [(keys[:, 2:], values[:, 2:]), (keys[:, :2], values[:, :2])]
    assert torch.allclose(prefix_attention(attn, x, split), y)
    assert not torch.allclose(prefix_attention(attn, x, [(values, keys)]), y)


def test_shared_prompts_need_no_batch_axis(attn: Attention) -> None:
    x, keys, values = rows(2, 5, 12, start=1), rows(4, 12, start=2), rows(4, 12, start=3)
    y = prefix_attention(attn, x, [(keys.expand(2, -1, -1), values.expand(2, -1, -1))])
    assert torch.equal(prefix_attention(attn, x, [(keys, values)]), y)
    assert torch.equal(prefix_attention(attn, x, [(keys[None], values[None])]), y)


def test_empty_prefix_is_plain_attention(attn: Attention) -> None:
    x = rows(2, 5, 12, start=1)
    empty = torch.zeros(2, 0, 12, dtype=torch.float64)
    assert torch.allclose(prefix_attention(attn, x, [(empty, empty)]), attn(x))


def test_additive_vectors_change_one_tokens_key_and_value(attn: Attention) -> None:
    x, key, value = rows(2, 5, 12, start=1), rows(12, start=2), rows(12, start=3)
    q, k, v = (part.detach().clone() for part in attn.qkv(x).chunk(3, dim=-1))
    k[:, 1] += key
    v[:, 1] += value
    heads = [
        torch.softmax(q[..., h] @ k[..., h].mT / 2, -1) @ v[..., h]
        for h in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    want = attn.proj(torch.cat(heads, -1))
    assert torch.allclose(prefix_attention(attn, x, additive=Additive(1, key, value)), want)


def test_halves_are_keys_then_values() -> None:
    keys, values = halves(torch.arange(8).view(4, 2))
    assert keys.tolist() == [[0, 1], [2, 3]]
    assert values.tolist() == [[4, 5], [6, 7]]


def test_foreign_blocks_are_refused(net: Any, vit: Any) -> None:
    from limbeck.nets.prompts.coda import CODA

    backbone = vit()
    backbone.blocks[1] = nn.Identity()
    with pytest.raises(ShapeError, match=r"blocks\.1 is a Identity"):
        net(CODA(pool=3, length=4, blocks=(1,)), vit=backbone)
