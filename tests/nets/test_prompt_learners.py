"""What every prompt learner keeps: run over the whole table."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from limbeck import registry
from limbeck.errors import ConfigError, ShapeError

SMALL: dict[str, dict[str, Any]] = {
    "coda": {"pool": 6, "length": 4, "blocks": (0, 1)},
    "l2p": {"pool": 4, "length": 2, "top_k": 2},
    "dualprompt": {"g_length": 2, "g_blocks": (0,), "e_length": 2, "e_blocks": (1, 2)},
}


@pytest.fixture(params=registry.names("prompts"))
def name(request: Any) -> str:
    return str(request.param)


def config(name: str) -> Any:
    return registry.get("prompts", name)(**SMALL.get(name, {}))


def learned(student: Any) -> dict[str, torch.Tensor]:
    return {n: p for n, p in student.named_parameters() if p.requires_grad}


def step(student: Any, data: Any, columns: tuple[int, int]) -> Any:
    said = student(data)
    start, stop = columns
    loss = F.cross_entropy(said.logits[:, start:stop], data.labels % (stop - start))
    return loss + sum(said.losses.values())


def test_terms_are_finite_and_gradient_reaches_all_that_learns(name: str, net: Any, batch: Any) -> None:
    student = net(config(name)).train()
    torch.nn.init.normal_(student.head.weight)  # a head that starts at zero passes no gradient on
    total = step(student, batch(8), (0, 2))
    assert total.isfinite()
    total.backward()
    for path, parameter in learned(student).items():
        assert parameter.grad is not None and parameter.grad.any(), path
    assert not any(p.grad is not None for p in student.backbone.parameters())


def test_only_the_current_tasks_columns_learn(name: str, net: Any, batch: Any) -> None:
    student = net(config(name)).train()
    student.start_task(1, torch.Generator().manual_seed(1))
    step(student, batch(), (2, 4)).backward()
    for grad in (student.head.weight.grad, student.head.bias.grad):
        assert not grad[:2].any() and not grad[4:].any()
    assert student.head.weight.grad[2:4].any()


def test_order_and_size_of_the_batch_do_not_matter(name: str, net: Any, batch: Any) -> None:
    student, data = net(config(name)).eval(), batch(6)
    turned = dataclasses.replace(data, inputs=data.inputs.flip(0))
    assert torch.allclose(student(data).logits.flip(0), student(turned).logits, atol=1e-5)
    alone = dataclasses.replace(data, inputs=data.inputs[:1])
    assert torch.allclose(student(data).logits[:1], student(alone).logits, atol=1e-5)


def test_saving_and_loading_between_tasks(name: str, net: Any, batch: Any) -> None:
    student, other = net(config(name)), net(config(name))
    generator = torch.Generator().manual_seed(1)
    for task in (1, 2):
        student.finish_task()
        student.start_task(task, generator)
    other.load_state_dict(student.state_dict())
    assert other.prompts.task == 2
    for mode in (True, False):
        one, two = student.train(mode)(batch()), other.train(mode)(batch())
        assert torch.equal(one.logits, two.logits)
        assert {n: t.item() for n, t in one.losses.items()} == {n: t.item() for n, t in two.losses.items()}


def test_tasks_start_in_order_and_once(name: str, net: Any) -> None:
    student = net(config(name))
    student.start_task(1, torch.Generator().manual_seed(1))
    before = {n: t.clone() for n, t in student.prompts.state_dict().items()}
    student.start_task(1, torch.Generator().manual_seed(2))
    assert all(torch.equal(before[n], t) for n, t in student.prompts.state_dict().items())
    for task in (0, 3):
        with pytest.raises(ConfigError, match=f"cannot start task {task}: they are at task 1 of 3"):
            student.start_task(task, torch.Generator())


def test_same_seed_same_prompts(name: str) -> None:
    def build() -> Any:
        generator = torch.Generator().manual_seed(5)
        module = config(name).build(24, 24, 3, 3, generator)
        module.start_task(1, generator)
        return module.state_dict().values()

    assert all(torch.equal(a, b) for a, b in zip(build(), build(), strict=True))


def test_half_precision(name: str, net: Any, batch: Any) -> None:
    student = net(config(name)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = step(student, batch(), (0, 2))
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_a_wide_query_and_a_narrow_network(name: str, net: Any, batch: Any) -> None:
    student = net(config(name), query_dim=40)
    query = torch.rand(4, 40)
    assert student(batch(query=query)).logits.shape == (4, 6)


def test_blocks_beyond_the_network_are_refused(name: str) -> None:
    kind = registry.get("prompts", name)
    fields = [f.name for f in dataclasses.fields(kind) if f.name.endswith("blocks")]
    for field in fields:
        extra = {"form": "prefix", "length": 2} if name == "l2p" else {}
        wrong = dataclasses.replace(config(name), **{field: (0, 9)}, **extra)
        with pytest.raises(ShapeError, match=field):
            wrong.build(24, 24, 3, 3, torch.Generator())


def test_docstring_names_every_field(name: str) -> None:
    kind = registry.get("prompts", name)
    doc = inspect.getdoc(kind) or ""
    for field in dataclasses.fields(kind):
        assert f"{field.name}:" in doc, f"{kind.__name__}.{field.name} is not explained"
