"""CDL v1: the teacher's prompts, mapped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from limbeck.contracts import Outputs
from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.prompt_map import PromptMap, prompt_map
from limbeck.nets.prompts.coda import CODA

MAP = PromptMap(components=3, length=4, blocks=(0, 1))
LEARNER = CODA(pool=6, length=4, blocks=(0, 1))


def told(teacher: Any, student: Any, data: Any) -> Any:
    return teacher(replace(data, query=student.query(data.inputs)))


def test_both_heads_read_the_class_token(net: Any, vit: Any, batch: Any) -> None:
    teacher = net(LEARNER, vit=vit(embed_dim=48), query_dim=24)
    student = net(LEARNER, prompt_map=MAP)
    student.attach_teacher(teacher)
    student.train()
    said = student(batch(), taps=("norm",), teacher=told(teacher.train(), student, batch()))
    token = said.features["norm"][:, 0]
    assert torch.allclose(said.logits, student.head(token), atol=1e-6)
    assert torch.allclose(said.soft, student.kd_head(token), atol=1e-6)
    said.soft.sum().backward()
    assert student.mapping.keys.grad.any() and student.mapping.prompts.grad.any()
    assert all(p.grad is None for p in teacher.parameters())
    names = [group["name"] for group in student.parameter_groups()]
    assert names == ["prompts", "prompt_map", "head", "kd_head"]


def test_test_time_needs_no_teacher_and_follows_it(net: Any, vit: Any, batch: Any) -> None:
    teacher = net(LEARNER, vit=vit(embed_dim=48), query_dim=24).eval()
    student = net(LEARNER, prompt_map=MAP)
    student.attach_teacher(teacher)
    alone = student.eval()(batch())
    student.prompts.train()
    student.training = True
    beside = student(batch(), teacher=told(teacher, student, batch()))
    assert torch.allclose(alone.soft, beside.soft, atol=1e-5)
    student.eval()
    with torch.no_grad():
        teacher.prompts.prompts.mul_(-3)
    assert torch.equal(student(batch()).soft, alone.soft)
    student.finish_task()
    assert not torch.allclose(student(batch()).soft, alone.soft)
    assert not any(p.requires_grad for p in student.teacher_prompts.parameters())


def test_kept_prompts_follow_the_task_and_are_saved(net: Any, vit: Any, batch: Any) -> None:
    teacher = net(LEARNER, vit=vit(embed_dim=48), query_dim=24)
    student, other = net(LEARNER, prompt_map=MAP), net(LEARNER, prompt_map=MAP)
    for one in (student, other):
        one.attach_teacher(teacher)
    teacher.start_task(1, torch.Generator().manual_seed(1))
    student.start_task(1, torch.Generator().manual_seed(2))
    student.finish_task()
    assert student.teacher_prompts.task == 1
    other.load_state_dict(student.state_dict())
    assert other.teacher_prompts.task == 1 and other.prompts.task == 1
    assert torch.equal(other.eval()(batch()).soft, student.eval()(batch()).soft)


def test_mapping_gives_half_keys_half_values_and_no_gradient_to_the_teacher() -> None:
    keys, values = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    banks = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 6, 5, requires_grad=True)
    mapped = prompt_map(keys, values, *banks)
    assert mapped[0].shape == mapped[1].shape == (2, 3, 5)
    (mapped[0].sum() + mapped[1].sum()).backward()
    assert keys.grad is None and values.grad is None and banks[2].grad is not None


def test_what_does_not_fit(net: Any, vit: Any, batch: Any) -> None:
    student = net(LEARNER, prompt_map=MAP)
    with pytest.raises(ConfigError, match="have no teacher"):
        student(batch())
    with pytest.raises(ShapeError, match=r"prompt_map\.blocks has \[1\], where the teacher has no prompts"):
        student.attach_teacher(net(CODA(pool=6, length=4, blocks=(0,)), vit=vit(embed_dim=48)))
    student.attach_teacher(net(LEARNER))
    with pytest.raises(ConfigError, match="but it gave none"):
        student.train()(batch(), teacher=Outputs(logits=torch.zeros(4, 6)))
    with pytest.raises(ConfigError, match=r"prompt_map\.length is 3"):
        PromptMap(length=3)
    with pytest.raises(ShapeError, match=r"prompt_map\.blocks is \[0, 9\]"):
        net(LEARNER, prompt_map=PromptMap(blocks=(0, 9)))
