"""TAID: a target that moves from the student to the teacher, and what it remembers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.objectives import texts

from limbeck import losses
from limbeck.contracts import Outputs, Progress
from limbeck.errors import ConfigError
from limbeck.objectives.taid import TAIDObjective

OWN, OTHER = 4, 6


def built(**fields: Any) -> Any:
    return TAIDObjective(**fields).build(texts.said(1, OWN), texts.said(2, OTHER))


def trained(module: Any, steps: range, total: int, drop: float = 0.0) -> list[float]:
    """t after each of some steps of a student that approaches its teacher by ``drop`` a step."""
    found = []
    for step in steps:
        student = texts.said(1, OWN)
        logits = (1 - drop) ** step * student.logits
        own, other = Outputs(logits=logits), Outputs(logits=torch.zeros_like(logits))
        module(own, other, texts.batch(), Progress(step=step, steps=total))
        found.append(float(module.t))
    return found


def test_value_and_gradient_are_those_of_the_mixed_logits() -> None:
    student, teacher = texts.said(1, OWN, grad=True), texts.said(2, OTHER)
    found = built(t_start=0.3)(student, teacher, texts.batch(), Progress(steps=9))["taid"]
    (grad,) = torch.autograd.grad(found, student.hidden)
    logits = student.logits.detach().requires_grad_()
    target = (0.7 * logits.detach() + 0.3 * teacher.logits).softmax(-1)
    loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
    (slope,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found.detach(), loss.detach(), rtol=1e-6, atol=0)
    assert student.unembedding is not None
    torch.testing.assert_close(grad, slope @ student.unembedding.weight, rtol=1e-5, atol=1e-7)


def test_at_the_end_it_is_forward_kl_and_at_0_it_teaches_nothing() -> None:
    student, teacher = texts.said(1, OWN, grad=True), texts.said(2, OTHER)
    last = built(t_start=1.0)(student, teacher, texts.batch(), Progress())["taid"]
    plain = losses.token_divergence(losses.ForwardKL(cross_entropy=True), student.logits, teacher.logits)
    torch.testing.assert_close(last, plain)
    first = built(t_start=0.0)(student, teacher, texts.batch(), Progress(steps=9))["taid"]
    (grad,) = torch.autograd.grad(first, student.hidden)
    assert grad.abs().max() < 1e-12
    shares = student.logits.softmax(-1)
    torch.testing.assert_close(first, -torch.xlogy(shares, shares).sum(-1).mean())


def test_the_loss_of_a_step_uses_the_t_from_before_it() -> None:
    module = built(t_start=0.0)
    at = Progress(step=5, steps=9)
    args = texts.said(1, OWN), texts.said(2, OTHER), texts.batch(), at
    first = module(*args)["taid"]
    assert float(module.t) == 0  # the first loss is only remembered
    assert module(*args)["taid"] == first
    assert float(module.t) > 0
    assert module(*args)["taid"] != first


def test_t_never_falls_and_stays_between_its_line_and_its_end() -> None:
    for drop in (0.05, -0.05):  # a loss that falls, and one that rises
        module = built(alpha=0.05, beta=0.5)
        found = trained(module, range(30), 30, drop)
        assert all(a <= b for a, b in pairwise(found))
        assert all(0.4 + 0.6 * n / 30 <= t + 1e-6 <= 1 + 2e-6 for n, t in enumerate(found) if n)


def test_without_adaptation_t_is_the_line_bit_for_bit() -> None:
    found = trained(built(adaptive=False), range(8), 8, 0.1)
    line = torch.tensor([0.4 + (1 - 0.4) * step / 8 for step in range(1, 8)])
    assert found[1:] == line.tolist()


def test_the_adaptive_part_acts_where_alpha_is_large_enough() -> None:
    slow, fast, line = (
        trained(built(**fields), range(40), 40, 0.02) for fields in ({}, {"alpha": 0.5}, {"adaptive": False})
    )
    assert slow == line
    assert fast[20] > line[20] + 0.05


def test_nothing_moves_outside_of_training() -> None:
    module = built().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trained(module, range(4), 8)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_spoilt_loss_leaves_the_state_alone() -> None:
    module = built()
    trained(module, range(3), 8)
    kept = {name: float(module.state_dict()[name]) for name in ("t", "momentum", "previous")}
    spoilt = Outputs(logits=torch.full((9, texts.VOCABULARY), math.nan))
    module(spoilt, spoilt, texts.batch(), Progress(step=3, steps=8))
    assert module.facts()["refused"] == 1
    assert {name: float(module.state_dict()[name]) for name in kept} == kept
    assert trained(module, range(4, 8), 8)[-1] > kept["t"]


def test_a_state_that_is_saved_and_loaded_goes_on_as_before() -> None:
    whole, first = built(alpha=0.05), built(alpha=0.05)
    trained(whole, range(10), 20, 0.1)
    trained(first, range(5), 20, 0.1)
    second = built(alpha=0.05)
    second.load_state_dict(first.state_dict())
    trained(second, range(5, 10), 20, 0.1)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0)


def test_a_stage_begins_at_the_start_again() -> None:
    module = built()
    trained(module, range(6), 8)
    module.start(torch.arange(3), torch.zeros(3), torch.Generator())
    assert module.facts() == {"t": pytest.approx(0.4), "way": [None] * 10, "refused": 0}


def test_facts_tell_the_way_of_t() -> None:
    module = built()
    found = trained(module, range(20), 20)
    facts = module.facts()
    assert facts["way"] == pytest.approx(found[1::2])
    assert facts["t"] == found[-1]


def test_weights_choose_tokens_and_the_top_tokens_will_do() -> None:
    student, teacher = texts.said(1, OWN), texts.said(2, OTHER)
    chosen = torch.zeros(9, dtype=torch.float64)
    chosen[4] = 9
    some = built(t_start=0.3)(student, teacher, replace(texts.batch(), weight=chosen), Progress(steps=9))
    mixed = (0.7 * student.logits + 0.3 * teacher.logits)[4].softmax(-1)
    torch.testing.assert_close(some["taid"], -(mixed * student.logits[4].log_softmax(-1)).sum())
    ids = teacher.logits.topk(3).indices
    top = Outputs(logits=torch.empty(9, 0), top=(ids, teacher.logits.log_softmax(-1).gather(1, ids)))
    found = built()(student, top, texts.batch(), Progress(steps=9))["taid"]
    assert 0 < found < math.log(4) + 3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"t_start": 0.5, "t_end": 0.4}, "t_start is 0.5 and t_end 0.4"),
        ({"t_end": 1.1}, "t_end 1.1"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TAIDObjective(**fields)
