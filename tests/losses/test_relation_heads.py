"""What must be true of relations between the tokens of a text."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, ShapeError
from limbeck.losses import head_products, relation_loss, relation_losses, token_relations
from limbeck.losses.relation_heads import Form, Projections

seeds = st.integers(0, 2**31)
forms = st.sampled_from(["softmax", "raw"])
HEADS = 3


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(seed: int, *shape: int) -> Projections:
    return draw(seed, *shape), draw(seed + 1, *shape), draw(seed + 2, *shape)


def test_the_plain_form_is_equation_4() -> None:
    own, other = draws(0, 2, 5, 12), draws(3, 2, 5, 18)
    for part, x, y in zip(relation_losses(own, other, HEADS), own, other, strict=True):
        error = 0.0
        for head in range(HEADS):
            a, b = x[..., 4 * head : 4 * head + 4], y[..., 6 * head : 6 * head + 6]
            r = (a @ a.mT / 2).softmax(-1) - (b @ b.mT / math.sqrt(6)).softmax(-1)
            error += float(r.square().mean()) / HEADS
        assert float(part) == pytest.approx(error, rel=1e-12)


@given(seeds, forms, st.booleans())
def test_a_student_that_equals_its_teacher_loses_nothing(seed: int, form: Form, causal: bool) -> None:
    own = draws(seed, 2, 5, 12)
    assert relation_loss(own, own, HEADS, form=form, causal=causal) == 0


@given(seeds, forms, st.booleans())
def test_a_rotation_within_a_relation_head_changes_nothing(seed: int, form: Form, causal: bool) -> None:
    own, other = draws(seed, 2, 5, 12), draws(seed + 3, 2, 5, 6)
    turn = torch.block_diag(*(torch.linalg.qr(draw(seed + k, 4, 4)).Q for k in range(HEADS)))
    q, k, v = (x @ turn for x in own)
    torch.testing.assert_close(
        relation_loss((q, k, v), other, HEADS, form=form, causal=causal),
        relation_loss(own, other, HEADS, form=form, causal=causal),
    )


@given(seeds, st.integers(1, 9), st.floats(0, 30))
def test_softmax_relations_differ_by_at_most_2_over_the_number_of_tokens(
    seed: int, count: int, scale: float
) -> None:
    own, other = draws(seed, 2, count, 6), draws(seed + 3, 2, count, 9)
    q, k, v = (scale * x for x in own)
    for part in relation_losses((q, k, v), other, HEADS):
        assert 0 <= part <= 2 / count + 1e-12


@given(seeds, forms, st.booleans())
def test_padding_changes_nothing_and_may_hold_anything(seed: int, form: Form, causal: bool) -> None:
    own, other = draws(seed, 2, 4, 6), draws(seed + 3, 2, 4, 9)
    leaves = tuple(x.clone().requires_grad_() for x in own)
    plain = relation_loss(leaves, other, HEADS, form=form, causal=causal)  # type: ignore[arg-type]
    expected = torch.autograd.grad(plain, leaves)

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_full((2, 3, x.shape[2]), torch.nan)], dim=1)

    mask = torch.tensor([[True] * 4 + [False] * 3] * 2)
    q, k, v = (padded(x) for x in leaves)
    tq, tk, tv = (padded(x) for x in other)
    found = relation_loss((q, k, v), (tq, tk, tv), HEADS, form=form, causal=causal, mask=mask)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), expected)


def test_texts_of_different_length_count_by_their_tokens() -> None:
    own, other = draws(0, 2, 4, 6), draws(3, 2, 4, 9)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    by_token = relation_loss(own, other, HEADS, mask=mask, reduction="none")
    assert by_token.shape == (2, 4)
    assert by_token[1, 2:].tolist() == [0, 0]
    torch.testing.assert_close(relation_loss(own, other, HEADS, mask=mask), by_token.sum() / 6)
    first = relation_loss(*(tuple(x[:1] for x in p) for p in (own, other)), HEADS)  # type: ignore[arg-type]
    torch.testing.assert_close(by_token[0].mean(), first)


def test_pairs_part_packed_documents() -> None:
    own, other = draws(0, 1, 5, 6), draws(3, 1, 5, 9)
    segments = torch.tensor([[0, 0, 1, 1, 1]])
    pairs = segments[:, :, None] == segments[:, None]
    found = token_relations(own[0], HEADS, mask=pairs)
    assert found[0, :, :2, 2:].abs().max() == 0
    torch.testing.assert_close(found[..., 2:, 2:], token_relations(own[0][:, 2:], HEADS))
    torch.testing.assert_close(found.sum(-1), torch.ones(1, HEADS, 5, dtype=torch.float64))
    assert relation_loss(own, other, HEADS, mask=pairs) > 0


def test_a_causal_relation_sees_no_later_token() -> None:
    x = draw(0, 2, 5, 6)
    found = token_relations(x, HEADS, causal=True)
    assert found.triu(1).abs().max() == 0
    torch.testing.assert_close(found[:, :, :3, :3], token_relations(x[:, :3], HEADS, causal=True))


def test_the_teacher_gets_no_gradient_and_weights_scale_texts() -> None:
    own, other = draws(0, 2, 4, 6), tuple(x.requires_grad_() for x in draws(3, 2, 4, 9))
    assert not relation_loss(own, other, HEADS).requires_grad  # type: ignore[arg-type]
    weights = torch.tensor([2.0, 0.0], dtype=torch.float64)
    found = relation_loss(own, other, HEADS, weights=weights)  # type: ignore[arg-type]
    items = relation_loss(own, other, HEADS, reduction="none")  # type: ignore[arg-type]
    torch.testing.assert_close(found, 2 * items[0].sum() / 8)


def test_betas_weigh_queries_keys_and_values() -> None:
    own, other = draws(0, 2, 4, 6), draws(3, 2, 4, 9)
    q, k, v = relation_losses(own, other, HEADS)
    torch.testing.assert_close(relation_loss(own, other, HEADS, betas=(1, 0, 3)), q + 3 * v)
    torch.testing.assert_close(relation_loss(own, other, HEADS), q + k + v)


def test_features_left_over_are_dropped_and_half_precision_is_computed_in_full() -> None:
    x = draw(0, 2, 4, 8)
    torch.testing.assert_close(head_products(x, x, HEADS), head_products(x[..., :6], x[..., :6], HEADS))
    assert token_relations(x.bfloat16(), HEADS).dtype == torch.float32


def test_bad_input() -> None:
    own, other = draws(0, 2, 4, 6), draws(3, 2, 5, 9)
    with pytest.raises(ShapeError, match="of the same texts"):
        relation_loss(own, other, HEADS)
    with pytest.raises(ShapeError, match="6 features but must have at least heads = 7"):
        relation_loss(own, own, 7)
    with pytest.raises(ShapeError, match=r"mask is \[2, 5\]"):
        relation_loss(own, own, HEADS, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"unknown form 'sofmax'.*did you mean 'softmax'"):
        relation_loss(own, own, HEADS, form="sofmax")  # type: ignore[arg-type]
