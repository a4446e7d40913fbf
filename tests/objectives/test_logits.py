"""What must be true of the objectives on logits: labels, kd, dkd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Objective, Outputs, Progress
from limbeck.errors import ConfigError, ShapeError
from limbeck.objectives.dkd import DKD
from limbeck.objectives.kd import KD
from limbeck.objectives.labels import Labels

CLASSES, START, STOP = 10, 4, 7


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(labels: list[int], weight: Tensor | None = None) -> Batch:
    index = torch.arange(len(labels))
    return Batch(inputs=index, labels=torch.tensor(labels), index=index, view=0 * index, weight=weight)


def step(
    objectives: list[Objective], student: Outputs, teacher: Outputs, at: Progress | None = None
) -> Tensor:
    """The engine's view of a task: the columns START .. STOP - 1, labels counted from START."""
    own, other = student.columns(START, STOP), teacher.columns(START, STOP)
    batch, at = batch_of([0, 2, 1, 1]), at or Progress()
    terms = [t for o in objectives for t in o.build(own, other)(own, other, batch, at).values()]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("soft", [KD(weight=0.5, temperature=2), DKD(weight=0.5, beta=4, warmup_epochs=0)])
@pytest.mark.parametrize("two_heads", [False, True])
def test_columns_outside_the_task_get_exactly_zero_gradient(soft: Objective, two_heads: bool) -> None:
    leaves = [draw(i, 4, CLASSES).requires_grad_() for i in range(1 + two_heads)]
    teacher = Outputs(logits=draw(5, 4, CLASSES))
    step([Labels(weight=0.5), soft], Outputs(*leaves), teacher).backward()
    for leaf in leaves:
        outside = torch.cat([leaf.grad[:, :START], leaf.grad[:, STOP:]], dim=1)
        assert outside.abs().max() == 0
        assert leaf.grad[:, START:STOP].abs().min() > 0


def test_only_the_heads_are_told_apart_by_the_weights() -> None:
    """Soft weight 0 leaves the KD head without gradient; labels weight 0 the class head."""
    for share in (0.0, 1.0):
        logits, soft = draw(0, 4, CLASSES).requires_grad_(), draw(1, 4, CLASSES).requires_grad_()
        both = [Labels(weight=1 - share), KD(weight=share, temperature=2)]
        step(both, Outputs(logits, soft), Outputs(draw(2, 4, CLASSES))).backward()
        silent, heard = (soft, logits) if share == 0 else (logits, soft)
        assert silent.grad.abs().max() == 0
        assert heard.grad.abs().max() > 0


@pytest.mark.parametrize("soft", [KD(), DKD()])
def test_teacher_logits_of_other_classes_change_nothing(soft: Objective) -> None:
    student, logits = Outputs(draw(0, 4, CLASSES)), draw(1, 4, CLASSES)
    changed = logits.clone()
    changed[:, :START] += 100
    changed[:, STOP:] = torch.nan
    assert step([soft], student, Outputs(logits)) == step([soft], student, Outputs(changed))


def test_labels_alone_is_cross_entropy_and_weight_zero_adds_nothing() -> None:
    student, teacher = Outputs(draw(0, 4, CLASSES)), Outputs(draw(1, 4, CLASSES))
    plain = losses.masked_cross_entropy(student.logits, torch.tensor([4, 6, 5, 5]), START, STOP)
    torch.testing.assert_close(step([Labels()], student, teacher), plain)
    torch.testing.assert_close(step([Labels(), KD(weight=0), DKD(weight=0)], student, teacher), plain)


def test_labels_needs_no_teacher() -> None:
    assert not Labels().needs().teacher_logits
    assert KD().needs().teacher_logits
    assert DKD().needs().teacher_logits


@pytest.mark.parametrize(
    ("warmup", "epoch", "share"), [(20, 0, 1 / 20), (20, 9, 0.5), (20, 30, 1), (0, 0, 1)]
)
def test_dkd_warms_up_from_epoch_one(warmup: int, epoch: int, share: float) -> None:
    student, teacher = Outputs(draw(0, 4, CLASSES)), Outputs(draw(1, 4, CLASSES))
    full = step([DKD(warmup_epochs=0)], student, teacher)
    got = step([DKD(warmup_epochs=warmup)], student, teacher, Progress(epoch=epoch, epochs=40))
    torch.testing.assert_close(got, share * full)


def test_dkd_with_one_class_is_zero() -> None:
    student, teacher = Outputs(draw(0, 4, 1).requires_grad_()), Outputs(draw(1, 4, 1))
    terms = DKD().terms(student, teacher, batch_of([0] * 4), Progress())
    assert all(t.item() == 0 for t in terms.values())


@pytest.mark.parametrize("soft", [KD(), DKD()])
def test_a_broken_teacher_is_seen(soft: Objective) -> None:
    logits = draw(1, 4, CLASSES)
    logits[0, START] = torch.inf
    assert not torch.isfinite(step([soft], Outputs(draw(0, 4, CLASSES)), Outputs(logits)))


@pytest.mark.parametrize("soft", [KD(), DKD()])
def test_class_counts_are_compared(soft: Objective) -> None:
    with pytest.raises(ShapeError, match="10 classes but the teacher has 9"):
        soft.build(Outputs(draw(0, 2, 10)), Outputs(draw(0, 2, 9)))


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        (Labels, {"weight": -1}, "weight is -1"),
        (Labels, {"smoothing": 1.0}, "smoothing is 1.0"),
        (KD, {"temperature": 0}, "temperature is 0"),
        (KD, {"weight": float("nan")}, "weight is nan"),
        (DKD, {"beta": -2}, "beta is -2"),
        (DKD, {"temperature": float("inf")}, "temperature is inf"),
        (DKD, {"warmup_epochs": -1}, "warmup_epochs is -1"),
    ],
)
def test_values_out_of_range_are_named(objective: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(**fields)
