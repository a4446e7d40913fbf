"""What must be true of the objectives on features: fitnets, reviewkd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Outputs, Progress
from limbeck.errors import ConfigError, ShapeError
from limbeck.objectives.fitnets import FitNets
from limbeck.objectives.reviewkd import MapFusion, ReviewKD, TokenFusion


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(count: int) -> Batch:
    index = torch.arange(count)
    return Batch(inputs=index, labels=index, index=index, view=0 * index)


def tapped(features: dict[str, Tensor]) -> Outputs:
    return Outputs(logits=torch.zeros(4, 3), features=features)


def hint(own: Sequence[int], other: Sequence[int]) -> tuple[nn.Module, Tensor, Tensor]:
    student = {"blocks.-1": draw(0, *own).requires_grad_()}
    teacher = {"blocks.-1": draw(1, *other).requires_grad_()}
    module = FitNets(weight=1).build(tapped(student), tapped(teacher))
    (loss,) = module(tapped(student), tapped(teacher), batch_of(own[0]), Progress()).values()
    loss.backward()
    assert teacher["blocks.-1"].grad is None
    assert student["blocks.-1"].grad.abs().max() > 0
    return module, loss, student["blocks.-1"]


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ((4, 5, 6), (4, 5, 8)),  # tokens
        ((4, 6, 8, 8), (4, 7, 4, 4)),  # half
        ((4, 6, 4, 4), (4, 7, 8, 8)),  # twice
        ((4, 6, 5, 5), (4, 7, 5, 5)),  # equal
        ((4, 6, 7, 7), (4, 7, 5, 5)),  # larger kernel
        ((4, 6), (4, 7)),  # pooled vectors
    ],
)
def test_hints_fit_and_every_weight_learns(own: Sequence[int], other: Sequence[int]) -> None:
    module, loss, _ = hint(own, other)
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        ((4, 6, 6), (4, 5, 8), "6 tokens but the teacher has 5"),
        ((4, 6, 4, 4), (4, 7, 6, 6), "4 high but the teacher's is 6"),
        ((4, 6, 8, 4), (4, 7, 4, 4), "one aspect ratio"),
        ((4, 6, 8), (4, 7, 4, 4), "tap tokens"),
    ],
)
def test_hints_that_cannot_fit_say_why(own: Sequence[int], other: Sequence[int], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        hint(own, other)


@pytest.mark.parametrize(("epoch", "share"), [(0, 1), (2, 1), (3, 0), (9, 0)])
def test_hints_end_where_they_shall(epoch: int, share: int) -> None:
    given = tapped({"blocks.-1": draw(0, 4, 5, 6)}), tapped({"blocks.-1": draw(1, 4, 5, 8)})
    always, first = (FitNets(until=until).build(*given) for until in (1.0, 0.3))
    first.load_state_dict(always.state_dict())
    at = Progress(epoch=epoch, epochs=10)
    assert first(*given, batch_of(4), at)["fitnets"] == share * always(*given, batch_of(4), at)["fitnets"]


@pytest.mark.parametrize("until", [0, 1.1, float("nan")])
def test_a_share_of_the_epochs_is_a_share(until: float) -> None:
    with pytest.raises(ConfigError, match=f"until is {until} but must lie in"):
        FitNets(until=until)


def test_a_missing_tap_is_named() -> None:
    given = tapped({"blocks.-2": draw(0, 4, 5, 6)})
    with pytest.raises(
        ShapeError, match=r"student gives no feature at tap 'blocks.-1': did you mean 'blocks.-2'"
    ):
        FitNets().build(given, given)


def review(own: Sequence[Sequence[int]], other: Sequence[Sequence[int]], **fields: Any) -> dict[str, Any]:
    taps = tuple(f"layer{i}" for i in range(len(own)))
    student = {
        tap: draw(i, *shape).requires_grad_() for i, (tap, shape) in enumerate(zip(taps, own, strict=True))
    }
    teacher = {
        tap: draw(i + 9, *shape).requires_grad_()
        for i, (tap, shape) in enumerate(zip(taps, other, strict=True))
    }
    objective = ReviewKD(student_taps=taps, teacher_taps=taps, **fields)
    module = objective.build(tapped(student), tapped(teacher))
    (loss,) = module(tapped(student), tapped(teacher), batch_of(4), Progress()).values()
    loss.backward()
    return {"module": module, "loss": loss, "student": student, "teacher": teacher}


@pytest.mark.parametrize(
    ("own", "other", "kind"),
    [
        ([(4, 5, 6)] * 3, [(4, 5, 8)] * 3, TokenFusion),
        ([(4, 5, 6)] * 2, [(4, 5, 8), (4, 5, 9)], TokenFusion),
        ([(4, 3, 8, 8), (4, 5, 4, 4), (4, 5)], [(4, 4, 8, 8), (4, 6, 4, 4), (4, 6)], MapFusion),
        ([(4, 3, 8, 8), (4, 5, 4, 4)], [(4, 4, 6, 6), (4, 6, 3, 3)], MapFusion),
        ([(4, 3, 8, 6), (4, 5, 4, 3)], [(4, 4, 8, 6), (4, 6, 4, 3)], MapFusion),
        ([(4, 5, 6)], [(4, 5, 8)], TokenFusion),
    ],
)
def test_review_fits_and_every_weight_learns(own: Any, other: Any, kind: type) -> None:
    found = review(own, other)
    assert isinstance(found["module"].fuse, kind)
    assert torch.isfinite(found["loss"])
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in found["module"].parameters())
    assert all(x.grad.abs().max() > 0 for x in found["student"].values())
    assert all(x.grad is None for x in found["teacher"].values())


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        ([(4, 6, 6)] * 2, [(4, 5, 8)] * 2, r"\[5, 6\] tokens"),
        ([(4, 5, 6), (4, 5, 7)], [(4, 5, 8)] * 2, "student blocks of one width"),
        ([(4, 5, 6), (4, 5, 4, 4)], [(4, 5, 8), (4, 5, 4, 4)], r"\[3, 4\] axes"),
    ],
)
def test_review_that_cannot_fit_says_why(own: Any, other: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        review(own, other)


def test_review_taps_the_last_blocks_shallow_to_deep() -> None:
    needs = ReviewKD(blocks=3).needs()
    assert needs.student == needs.teacher == ("blocks.-3", "blocks.-2", "blocks.-1")
    assert not needs.teacher_logits


def test_review_wants_as_many_taps_in_both() -> None:
    with pytest.raises(ConfigError, match="2 layers but teacher_taps names 12"):
        ReviewKD(student_taps=("a", "b"))


def test_review_warms_up_from_epoch_one() -> None:
    shapes = [(4, 5, 6)] * 2, [(4, 5, 8)] * 2
    torch.manual_seed(0)
    full = review(*shapes, warmup_epochs=0)["loss"]
    torch.manual_seed(0)
    torch.testing.assert_close(review(*shapes, warmup_epochs=20)["loss"], full / 20)


def test_deeper_features_reach_shallower_fusions_only() -> None:
    torch.manual_seed(0)
    fuse = TokenFusion([6, 6, 6], [8, 8, 8])
    features = [draw(i, 2, 5, 6).requires_grad_() for i in range(3)]
    fused = fuse(features)
    deepest = torch.autograd.grad(fused[2].sum(), features, allow_unused=True, retain_graph=True)
    assert [g is not None for g in deepest] == [False, False, True]
    shallowest = torch.autograd.grad(fused[0].sum(), features, allow_unused=True)
    assert all(g is not None for g in shallowest)
