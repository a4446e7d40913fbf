"""L2P in both forms: what its dossier says must be true."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.nets.prompts.l2p import L2P, gather_prompts, key_loss, reduce_sim, select


def draw(*shape: int, start: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(start))


def build(**fields: Any) -> Any:
    return L2P(**fields).build(8, 12, 3, 2, torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-2, 1e3))
def test_positive_scale_changes_neither_choice_nor_loss(start: int, scale: float) -> None:
    query, keys = draw(4, 8, start=start), draw(6, 8, start=start + 1)
    chosen, near = select(query, keys, 3)
    stretched = keys.clone()
    stretched[2] *= scale
    for again in (select(query * scale, keys, 3), select(query, stretched, 3)):
        assert torch.equal(again[0], chosen)
        assert torch.allclose(key_loss(again[1], again[0]), key_loss(near, chosen))
    assert -3 - 1e-9 <= reduce_sim(near, chosen) <= 3 + 1e-9


def test_nearest_first() -> None:
    chosen, near = select(draw(4, 8), draw(6, 8, start=1), 3)
    assert torch.equal(near.gather(1, chosen), near.sort(1, descending=True).values[:, :3])


def test_all_entries_are_used_with_k_as_large_as_the_pool() -> None:
    query, keys = draw(4, 8), draw(6, 8, start=1)
    for batchwise in (False, True):
        chosen, _ = select(query, keys, 6, batchwise=batchwise)
        assert torch.equal(chosen.sort(1).values, torch.arange(6).expand(4, 6))


def test_key_loss_is_zero_for_keys_along_the_query() -> None:
    query = draw(1, 8).expand(4, 8)
    keys = torch.cat((2 * query[:1], 5 * query[:1], -query[:1]))
    chosen, near = select(query, keys, 2)
    assert torch.allclose(reduce_sim(near, chosen), torch.tensor(2.0).double())
    assert key_loss(near, chosen).abs() < 1e-12


def test_vote_takes_the_most_frequent_then_the_smaller_id_then_pads() -> None:
    keys = torch.eye(4).double()
    query = torch.tensor([[0, 0, 1, 0.5], [0, 0, 1, 0.4], [0.5, 1, 0, 0]]).double()
    chosen, _ = select(query, keys, 2, batchwise=True)
    assert chosen.tolist() == [[2, 3]] * 3
    one = torch.tensor([[0, 1.0, 0, 0]]).double().expand(3, 4)
    single, _ = select(one, keys, 1, batchwise=True)
    assert single.tolist() == [[1]] * 3


def test_null_queries_have_similarity_zero() -> None:
    _, near = select(torch.zeros(2, 8).double(), draw(6, 8), 2)
    assert not near.any()


def test_only_chosen_keys_and_prompts_learn_and_prompts_never_teach_keys() -> None:
    module = build(form="prefix", pool=6, length=4, top_k=2, blocks=(0, 1)).train()
    query = draw(3, 8).float().requires_grad_()
    found = module(query)
    (keys_alone,) = torch.autograd.grad(found.loss, module.keys, retain_graph=True)
    (found.loss + sum(k.square().sum() + v.square().sum() for k, v in found.prefix.values())).backward()
    assert query.grad is None and torch.equal(module.keys.grad, keys_alone)
    for block in range(2):
        used = set(found.chosen[block].flatten().tolist())
        for entry in range(6):
            assert module.keys.grad[block, entry].any() == (entry in used)
            assert module.prompts.grad[block, entry].any() == (entry in used)


def test_gather_is_plain_indexing() -> None:
    prompts, chosen = draw(2, 6, 4, 5).requires_grad_(), torch.tensor([[[0, 3], [3, 5]], [[1, 1], [2, 0]]])
    found = gather_prompts(prompts, chosen)
    plain = torch.stack([prompts[block][chosen[block]] for block in range(2)])
    assert torch.equal(found, plain)
    weights = draw(*found.shape, start=1)
    (ours,) = torch.autograd.grad((weights * found).sum(), prompts)
    (want,) = torch.autograd.grad((weights * plain).sum(), prompts)
    assert torch.allclose(ours, want)


@pytest.mark.parametrize("form", ["prepend", "prefix"])
def test_repeating_the_batch_leaves_the_terms(form: str) -> None:
    module = build(form=form, pool=6, length=4, top_k=2).train()
    query = draw(3, 8).float()
    assert torch.allclose(module(query).loss, module(torch.cat((query, query))).loss)


def test_the_published_pairs_grow_with_the_batch() -> None:
    module = build(form="prefix", pool=6, length=4, top_k=2, pairs="all").train()
    query = draw(3, 8).float()
    assert torch.allclose(module(torch.cat((query, query))).loss, 4 * module(query).loss)


def test_prefix_form_splits_and_joins_in_order_of_nearness() -> None:
    module = build(form="prefix", pool=6, length=4, top_k=2)
    found = module(draw(3, 8).float())
    entry = module.prompts[0][found.chosen[0, 1]]
    keys, values = found.prefix[0]
    assert torch.equal(keys[1], entry[:, :2].flatten(0, 1)) and torch.equal(
        values[1], entry[:, 2:].flatten(0, 1)
    )


def test_starts_and_presets() -> None:
    original, plus = build(), build(form="prefix", start=(0.0, 1.0), pool=30, length=20)
    assert original.prompts.max() < 0.01 and original.prompts.min() >= 0
    assert plus.prompts.max() > 0.9
    preset = L2P.plus(blocks=(0, 1))
    assert (preset.pool, preset.length, preset.top_k, preset.weight, preset.blocks) == (
        30,
        20,
        5,
        1.0,
        (0, 1),
    )


def test_original_head_starts_at_zero_and_stays_frozen_outside_the_task(net: Any, batch: Any) -> None:
    student = net(L2P(pool=4, length=2, top_k=2)).train()
    assert not student.head.weight.any()
    assert student.prompts.reads_prompts
    student(batch()).columns(2, 4).logits.logsumexp(1).sum().backward()
    assert student.head.weight.grad[2:4].any()
    assert not student.head.weight.grad[:2].any() and not student.head.weight.grad[4:].any()


def test_prefix_form_keeps_the_length_and_empty_prompts_are_the_plain_network(net: Any, batch: Any) -> None:
    student = net(L2P(form="prefix", pool=4, length=2, top_k=2))
    assert student(batch(), taps=("norm",)).features["norm"].shape[1] == 17
    empty = net(L2P(form="prefix", pool=4, length=0, top_k=2))
    assert torch.equal(empty(batch()).logits, net()(batch()).logits)


def test_fields_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="top_k is 5 but must be from 1 to the pool's 4 entries"):
        L2P(pool=4)
    with pytest.raises(ConfigError, match="length is 5 but must be even"):
        L2P(form="prefix", length=5)
    with pytest.raises(ConfigError, match="start is"):
        L2P(start=(1.0, 0.0))
