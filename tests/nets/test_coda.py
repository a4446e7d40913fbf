"""CODA-Prompt: what its dossier says must be true."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.prompts.coda import CODA, attend, coda_prompt, gram_schmidt_expand, ortho

TASKS = 3


def draw(*shape: int, start: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(start))


def banks() -> tuple[Tensor, Tensor, Tensor]:
    return draw(6, 8, start=1), draw(6, 8, start=2), draw(6, 4, 5, start=3)


def build(**fields: Any) -> Any:
    config = CODA(**{"pool": 6, "length": 4, "blocks": (0, 2), **fields})
    return config.build(8, 12, 3, TASKS, torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_attend_is_the_cosine_of_key_and_attended_query(start: int, scale: float) -> None:
    query, keys, attention = draw(4, 8, start=start), draw(6, 8, start=start + 1), draw(6, 8, start=start + 2)
    plain = F.normalize(query[:, None] * attention, dim=-1) @ F.normalize(keys, dim=-1).T
    want = plain.diagonal(dim1=1, dim2=2) if plain.shape[1] == plain.shape[2] else None
    got = attend(query, keys, attention)
    assert want is not None and torch.allclose(got, want)
    assert got.abs().max() <= 1 + 1e-12
    for scaled in (
        (query * scale, keys, attention),
        (query, keys * scale, attention),
        (query, keys, attention * scale),
    ):
        assert torch.allclose(attend(*scaled), got)


def test_attend_is_one_for_a_key_along_the_query_and_flat_attention() -> None:
    query = draw(1, 8)
    assert torch.allclose(attend(query, 3 * query, torch.ones(1, 8).double()), torch.ones(1, 1).double())


def test_null_attention_weighs_nothing_and_has_finite_gradient() -> None:
    attention = torch.zeros(6, 8, requires_grad=True)
    weights = attend(torch.ones(2, 8), torch.ones(6, 8), attention)
    weights.sum().backward()
    assert not weights.any() and attention.grad is not None and attention.grad.isfinite().all()


def test_scaling_a_prompt_scales_its_share() -> None:
    query, (keys, attention, prompts) = draw(4, 8), banks()
    plain, _, _ = coda_prompt(query, keys, attention, prompts, task=2, group=2)
    more = prompts.clone()
    more[3] *= 5
    scaled, _, _ = coda_prompt(query, keys, attention, more, task=2, group=2)
    weight = attend(query, keys, attention)[:, 3, None, None]
    assert torch.allclose(scaled - plain, 4 * weight * prompts[3, :2])


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_only_the_current_group_learns(weight: float) -> None:
    leaves = [bank.requires_grad_() for bank in banks()]
    query = draw(4, 8).requires_grad_()
    keys, values, loss = coda_prompt(query, *leaves, task=1, group=2, ortho_weight=weight, train=True)
    (keys.square().sum() + values.square().sum() + (0 if loss is None else loss)).backward()
    assert query.grad is None
    for bank in leaves:
        assert bank.grad is not None
        assert not bank.grad[:2].any() and not bank.grad[4:].any() and bank.grad[2:4].any()


def test_later_groups_are_never_read_and_evaluation_uses_all_groups_so_far() -> None:
    query, found = draw(4, 8), banks()
    later = [bank.clone() for bank in found]
    for bank in later:
        bank[4:] = float("nan")
    for train in (True, False):
        one = coda_prompt(query, *found, task=1, group=2, train=train)[0]
        assert torch.equal(one, coda_prompt(query, *later, task=1, group=2, train=train)[0])
    assert not torch.allclose(one, coda_prompt(query, *found, task=0, group=2)[0])


def test_ortho_is_zero_for_orthonormal_rows_alone() -> None:
    assert ortho(torch.eye(4, 6)) == 0
    assert ortho(torch.tensor([[0.6, 0.8]])) < 1e-12
    assert ortho(torch.zeros(1, 3)) == 1
    assert ortho(2 * torch.eye(4, 6)) > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_new_rows_are_orthonormal_and_orthogonal_to_the_old(start: int) -> None:
    pool = torch.zeros(6, 3, 4)
    for task in range(TASKS):
        pool = gram_schmidt_expand(pool, draw(2, 12, start=start + task).float(), task)
        rows = pool[: 2 * task + 2].flatten(1)
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)
        assert not pool[2 * task + 2 :].any()


def test_expansion_copies_old_rows_and_survives_null_ones() -> None:
    pool = draw(6, 8)
    pool[0] = 0
    grown = gram_schmidt_expand(pool, draw(2, 8, start=5), 1)
    assert torch.equal(grown[:2], pool[:2]) and grown.isfinite().all()
    assert torch.allclose(grown[2:4] @ grown[1], torch.zeros(2).double(), atol=1e-9)


def test_each_block_has_its_own_bank() -> None:
    module = build().train()
    found = module(draw(3, 8).float())
    assert set(found.prefix) == {0, 2}
    single = coda_prompt(
        draw(3, 8).float(), module.keys[1], module.attention[1], module.prompts[1], task=0, group=2
    )
    assert torch.allclose(found.prefix[2][0], single[0]) and torch.allclose(found.prefix[2][1], single[1])


def test_earlier_rows_do_not_move_in_training() -> None:
    module = build(ortho_weight=0.1).train()
    module.start_task(1, torch.Generator().manual_seed(1))
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(3):
        found = module(draw(3, 8).float())
        optimiser.zero_grad()
        (found.prefix[0][0].sum() + found.prefix[2][1].sum() + found.loss).backward()
        optimiser.step()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter[:, :2], before[name][:, :2])
        assert torch.equal(parameter[:, 4:], before[name][:, 4:])
        assert not torch.equal(parameter[:, 2:4], before[name][:, 2:4])


def test_loading_between_tasks_restores_the_task() -> None:
    module, other, query = build(), build(), draw(3, 8).float()
    for task in (1, 2):
        module.start_task(task, torch.Generator().manual_seed(task))
    other.load_state_dict(module.state_dict())
    assert other.task == 2
    assert torch.equal(other(query).prefix[0][0], module(query).prefix[0][0])


def test_fields_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="length is 3 but must be even"):
        CODA(length=3)
    with pytest.raises(ConfigError, match=r"pool is 7 but must be a multiple of the 3 tasks"):
        build(pool=7)
    with pytest.raises(
        ShapeError, match="no more components can be orthogonal than the query has dimensions, 8"
    ):
        build(pool=9)
    with pytest.raises(ShapeError, match=r"prompts\.blocks is \[0, 3\]"):
        build(blocks=(0, 3))
    with pytest.raises(ConfigError, match="ortho_weight"):
        CODA(ortho_weight=-1.0)


def test_half_precision_banks_count_in_float32() -> None:
    keys, attention, prompts = (bank.bfloat16() for bank in banks())
    out, _, _ = coda_prompt(draw(2, 8).bfloat16(), keys, attention, prompts, task=0, group=2)
    assert out.dtype == torch.float32


def test_cross_entropy_alone_teaches_keys_and_attention(net: Any, batch: Any) -> None:
    student = net(CODA(pool=6, length=4, blocks=(0, 1))).train()
    F.cross_entropy(student(batch()).logits, batch().labels).backward()
    assert student.prompts.keys.grad.any() and student.prompts.attention.grad.any()


def test_no_rows_is_the_linear_probe(net: Any, batch: Any) -> None:
    student, probe = net(CODA(length=0, pool=3, blocks=(0,))), net()
    assert torch.equal(student(batch()).logits, probe(batch()).logits)
