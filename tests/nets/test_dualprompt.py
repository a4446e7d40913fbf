"""DualPrompt: what its dossier says must be true."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.nets.prompts.dualprompt import DualPrompt, e_prompt, match_loss

FIELDS: dict[str, Any] = {
    "g_blocks": (0,),
    "e_blocks": (1, 2),
    "g_length": 2,
    "e_length": 3,
    "start": (0.0, 1.0),
}


def draw(*shape: int, start: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(start))


def build(tasks: int = 3, **fields: Any) -> Any:
    config = DualPrompt(**{**FIELDS, **fields})
    return config.build(8, 12, 3, tasks, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shared", [True, False])
def test_a_task_moves_its_own_experts_and_the_general_prompts_alone(shared: bool) -> None:
    module = build(shared_keys=shared, top_k=2).train()
    module.start_task(1, torch.Generator())
    before = copy.deepcopy(module.state_dict())
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(2):
        found = module(draw(4, 8))
        optimiser.zero_grad()
        (found.loss + sum(k.square().sum() + v.sum() for k, v in found.prefix.values())).backward()
        optimiser.step()
    own, other = [2, 3], [0, 1, 4, 5]
    assert torch.equal(module.experts[:, :, other], before["experts"][:, :, other])
    assert torch.equal(module.keys[:, other], before["keys"][:, other])
    assert not torch.equal(module.experts[:, :, own], before["experts"][:, :, own])
    assert not torch.equal(module.keys[:, own], before["keys"][:, own])
    assert not torch.equal(module.general, before["general"])


def test_training_ignores_the_image_and_testing_follows_the_nearest_key() -> None:
    module = build(copy_previous=False).train()
    keys, _ = module(draw(4, 8)).prefix[1]
    assert torch.equal(keys, keys[:1].expand_as(keys)) and torch.equal(keys[0], module.experts[0, 0, 0])
    query = torch.cat((module.keys[0, 2:], 3 * module.keys[0, 2:], module.keys[0, :1])).detach()
    found = module.eval()(query)
    assert found.chosen[0].tolist() == [[2], [2], [0]]
    assert torch.equal(found.prefix[2][1][0], found.prefix[2][1][1])
    assert torch.equal(found.prefix[2][1][0], module.experts[1, 1, 2])
    assert found.loss is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-2, 1e2))
def test_match_loss_bounds_scale_and_batch(start: int, scale: float) -> None:
    query, keys, prompts = draw(4, 8, start=start), draw(3, 8, start=start + 1), draw(1, 2, 3, 2, 5)
    loss = match_loss(e_prompt(query, keys, prompts, task=1))
    assert 0 <= loss <= 2
    assert torch.allclose(match_loss(e_prompt(query * scale, keys * scale, prompts, task=1)), loss, atol=1e-5)
    twice = e_prompt(torch.cat((query, query)), keys, prompts, task=1)
    assert torch.allclose(match_loss(twice), loss, atol=1e-5)
    assert torch.allclose(match_loss(twice, "sum"), 8 * loss, atol=1e-4)


def test_match_loss_is_zero_for_a_key_along_every_query() -> None:
    keys = draw(3, 8)
    query = keys[1] * torch.tensor([[1.0], [2.0]])
    assert match_loss(e_prompt(query, keys, draw(1, 2, 3, 2, 5), task=1)).abs() < 1e-6


def test_match_loss_pulls_the_tasks_key_alone() -> None:
    query, keys = draw(4, 8).requires_grad_(), draw(3, 8, start=1).requires_grad_()
    match_loss(e_prompt(query, keys, draw(1, 2, 3, 2, 5), task=1)).backward()
    assert query.grad is None and keys.grad is not None
    assert keys.grad[1].any() and not keys.grad[[0, 2]].any()


def test_one_task_is_the_same_in_training_and_test(net: Any, batch: Any) -> None:
    student = net(DualPrompt(**FIELDS), tasks=1)
    assert torch.allclose(student.train()(batch()).logits, student.eval()(batch()).logits, atol=1e-6)


def test_no_rows_is_the_plain_network(net: Any, batch: Any) -> None:
    student = net(DualPrompt(**{**FIELDS, "g_length": 0, "e_length": 0}))
    assert torch.equal(student(batch()).logits, net()(batch()).logits)
    only_general = net(DualPrompt(**{**FIELDS, "e_length": 0}))
    assert only_general.query_dim is None and set(only_general(batch()).prompts) == {0}


def test_more_tasks_than_entries() -> None:
    with pytest.raises(ConfigError, match="pool is 2 but 3 tasks need 3 entries"):
        build(pool=2)
    with pytest.raises(ConfigError, match="task 3 has no prompts"):
        e_prompt(draw(4, 8), draw(3, 8), draw(1, 2, 3, 2, 5), task=3)
    module = build()
    with pytest.raises(ConfigError, match="cannot start task 2: they are at task 0 of 3"):
        module.start_task(2, torch.Generator())
    assert build(pool=5).experts.shape[2] == 5


def test_copying_the_previous_experts() -> None:
    for copied in (True, False):
        module = build(copy_previous=copied)
        keys = module.keys.detach().clone()
        module.start_task(1, torch.Generator())
        assert torch.equal(module.experts[:, :, 1], module.experts[:, :, 0]) == copied
        assert torch.equal(module.keys, keys)


def test_oracle_and_key_accuracy() -> None:
    module = build(copy_previous=False, shared_keys=False).eval()
    query = module.keys[0, [0, 0, 1]].detach()
    module.oracle = 1
    keys, _ = module(query).prefix[1]
    assert torch.equal(keys, module.experts[0, 0, 1].expand(3, -1, -1))
    hits = torch.stack(
        [(torch.cosine_similarity(query[:, None], t[None], dim=-1).argmax(1) == 0) for t in module.keys]
    )
    assert torch.allclose(module.key_accuracy(query, 0), hits.float().mean())
    assert build(e_length=0).key_accuracy(query, 0) is None


def test_general_and_expert_prompts_of_one_block_are_joined() -> None:
    module = build(g_blocks=(1,)).train()
    keys, values = module(draw(4, 8)).prefix[1]
    assert keys.shape == values.shape == (4, 5, 12)


def test_totals_count_keys_and_values_together() -> None:
    preset = DualPrompt.from_totals()
    assert (preset.g_length, preset.e_length) == (3, 10)
    assert not preset.shared_keys and not preset.copy_previous and preset.start == (0.0, 1.0)
    with pytest.raises(ConfigError, match="e_total is 7 but must be even"):
        DualPrompt.from_totals(e_total=7)
