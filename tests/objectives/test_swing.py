"""Swing distillation: private tokens hardly teach, and neither do their labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.objectives import texts
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Facts, Outputs, Progress
from limbeck.errors import ConfigError
from limbeck.losses.swing import swing_loss
from limbeck.objectives.swing import Swing

SURE, PUBLIC = texts.MARKS == 1, texts.MARKS == 0


def plain(seed: int, *, grad: bool = False) -> Outputs:
    return Outputs(logits=texts.said(seed, 4).logits.detach().requires_grad_(grad))


def terms(
    student: Outputs, *, marks: Tensor | None = None, step: int = 0, **fields: Any
) -> dict[str, Tensor]:
    module = Swing(**fields).build(student, plain(2), Facts(seed=5))
    batch = texts.batch() if marks is None else replace(texts.batch(), marks={"privacy": marks})
    found: dict[str, Tensor] = module(student, plain(2), batch, Progress(step=step, steps=9))
    return found


def slope(**fields: Any) -> Tensor:
    """Size of the gradient of each token."""
    student = plain(1, grad=True)
    (grad,) = torch.autograd.grad(sum(terms(student, **fields).values()), student.logits)
    return torch.as_tensor(grad).norm(dim=1)


def test_it_is_the_loss_of_the_marks() -> None:
    found = terms(plain(1), t_high=6.0)["divergence"]
    torch.testing.assert_close(
        found, swing_loss(plain(1).logits, plain(2).logits, texts.MARKS.double(), t_high=6.0)
    )


def test_without_private_tokens_it_is_kd_without_its_factor() -> None:
    found = terms(plain(1), marks=torch.zeros(9), t_low=2.0)["divergence"]
    divergence = losses.kl_divergence(plain(1).logits, plain(2).logits, 2.0) / 4
    torch.testing.assert_close(found, divergence)


def test_private_tokens_fall_silent_as_their_temperature_squared() -> None:
    low, high, higher = (slope(t_high=t) for t in (1.0, 100.0, 1000.0))
    assert (high[SURE] < 1e-3 * low[SURE]).all()
    torch.testing.assert_close(100 * higher[SURE], high[SURE], rtol=0.1, atol=0)
    torch.testing.assert_close(high[PUBLIC], low[PUBLIC])


def test_the_square_of_the_temperature_gives_the_secret_back() -> None:
    low, squared = slope(t_high=1.0), slope(t_high=1000.0, t_squared=True)
    assert (squared[SURE] > 0.2 * low[SURE]).all()


def test_the_cross_entropy_leaves_private_tokens_out() -> None:
    found = slope(weight=0.0, labels=1.0)
    assert (found[SURE] == 0).all()
    assert (found[PUBLIC] > 0).all()
    both = terms(plain(1), labels=0.5)
    public = losses.cross_entropy(plain(1).logits, texts.batch().labels, weights=1 - texts.MARKS)
    torch.testing.assert_close(both["labels"], 0.5 * public)


@pytest.mark.parametrize("kind", [{"sigma": 0.05}, {"epsilon": 40.0}])
def test_noise_is_fresh_in_each_step_and_the_same_again(kind: dict[str, float]) -> None:
    first, again, later = (terms(plain(1), **kind, step=n)["divergence"] for n in (3, 3, 4))
    assert first == again
    assert first != later
    assert first != terms(plain(1))["divergence"]


def test_data_that_marks_nothing_is_refused() -> None:
    student = plain(1)
    with pytest.raises(ConfigError, match=r"set data\.private"):
        Swing().build(student, student)(student, student, replace(texts.batch(), marks={}), Progress())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"t_low": 0.0}, "t_low is 0.0"),
        ({"t_high": 0.5}, "t_high 0.5"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"sigma": 0.1, "epsilon": 1.0}, "take one of the two noises"),
        ({"student_side": "sam"}, "same"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Swing(**fields)
