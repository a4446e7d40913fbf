"""What must be true of the objectives dist and pld, and of kd and dkd on standardised logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Objective, Outputs, Progress
from limbeck.errors import ConfigError, ShapeError
from limbeck.objectives.dist import DIST
from limbeck.objectives.dkd import DKD
from limbeck.objectives.kd import KD
from limbeck.objectives.labels import Labels
from limbeck.objectives.pld import PLD


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(objective: Objective, student: Outputs, teacher: Outputs) -> Tensor:
    index = torch.arange(4)
    batch = Batch(inputs=index, labels=torch.tensor([0, 2, 1, 1]), index=index, view=0 * index)
    terms = objective.build(student, teacher)(student, teacher, batch, Progress())
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize("objective", [KD(standardise=True), DKD(standardise=True, warmup_epochs=0)])
def test_standardised_logits_have_no_scale(objective: Objective) -> None:
    own, other = draw(0, 4, 5), draw(1, 4, 5)
    plain = total(objective, Outputs(own), Outputs(other))
    for scale in (0.2, 5):
        for pair in ((scale * own + 1, other), (own, scale * other + 1)):
            torch.testing.assert_close(total(objective, *map(Outputs, pair)), plain, rtol=1e-5, atol=0)


def test_standardising_is_off_unless_asked_for() -> None:
    own, other = Outputs(draw(0, 4, 5)), Outputs(draw(1, 4, 5))
    torch.testing.assert_close(
        total(KD(weight=1), own, other), losses.kl_divergence(own.logits, other.logits, 4)
    )
    z = [losses.standardise(x.logits) for x in (own, other)]
    torch.testing.assert_close(total(KD(weight=1, standardise=True), own, other), losses.kl_divergence(*z, 4))


def test_dist_weighs_its_two_parts() -> None:
    own, other = Outputs(draw(0, 4, 5)), Outputs(draw(1, 4, 5))
    inter, intra = losses.dist(own.logits, other.logits, 4)
    torch.testing.assert_close(
        total(DIST(beta=3, gamma=0.5, temperature=4), own, other), 3 * inter + 0.5 * intra
    )


def test_pld_is_the_whole_loss_and_cross_entropy_where_the_teacher_is_certain() -> None:
    own, labels = draw(0, 4, 5), torch.tensor([0, 2, 1, 1])
    certain = 50 * F.one_hot(labels, 5).double() + draw(1, 4, 5)
    alone = total(Labels(), Outputs(own), Outputs(certain))
    torch.testing.assert_close(total(PLD(), Outputs(own), Outputs(certain)), alone)
    torch.testing.assert_close(total(PLD(weighting="first"), Outputs(own), Outputs(draw(1, 4, 5))), alone)
    assert abs(total(PLD(temperature=20), Outputs(own), Outputs(certain)) - alone) > 0.1


def test_both_read_the_head_that_listens_to_the_teacher() -> None:
    hard, soft = draw(0, 4, 5).requires_grad_(), draw(1, 4, 5).requires_grad_()
    for objective in (PLD(), DIST()):
        total(objective, Outputs(hard, soft), Outputs(draw(2, 4, 5))).backward()
    assert hard.grad is None
    assert soft.grad.abs().max() > 0


@pytest.mark.parametrize("objective", [PLD(), PLD(weighting="uniform"), DIST(), KD(standardise=True)])
def test_a_broken_teacher_is_seen(objective: Objective) -> None:
    logits = draw(1, 4, 5)
    logits[0, 0] = torch.nan
    assert torch.isnan(total(objective, Outputs(draw(0, 4, 5)), Outputs(logits)))


@pytest.mark.parametrize("objective", [PLD(), DIST()])
def test_class_counts_are_compared(objective: Objective) -> None:
    with pytest.raises(ShapeError, match="10 classes but the teacher has 9"):
        objective.build(Outputs(draw(0, 2, 10)), Outputs(draw(0, 2, 9)))


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        (DIST, {"beta": -1}, "beta is -1"),
        (DIST, {"gamma": float("inf")}, "gamma is inf"),
        (DIST, {"temperature": 0}, "temperature is 0"),
        (PLD, {"weight": -1}, "weight is -1"),
        (PLD, {"temperature": 0}, "temperature is 0"),
    ],
)
def test_values_out_of_range_are_named(objective: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(**fields)
