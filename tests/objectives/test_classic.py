"""What must be true of the classic objectives on features: at, sp, rkd, nst, vid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Outputs, Progress
from limbeck.errors import ConfigError, ShapeError
from limbeck.objectives._shared import as_map, as_vector
from limbeck.objectives.at import AT
from limbeck.objectives.nst import NST
from limbeck.objectives.rkd import RKD
from limbeck.objectives.sp import SP
from limbeck.objectives.vid import VID, Guess

TAPS = {"student_taps": ("f",), "teacher_taps": ("f",)}
TAP = {"student_tap": "f", "teacher_tap": "f"}
ALL = [AT(**TAPS), NST(**TAPS), VID(**TAPS), SP(**TAP), RKD(**TAP)]
every = pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(count: int) -> Batch:
    index = torch.arange(count)
    return Batch(inputs=index, labels=index, index=index, view=0 * index)


def tapped(**features: Tensor) -> Outputs:
    return Outputs(logits=torch.zeros(4, 3), features=features)


def loss_of(objective: Any, own: Tensor, other: Tensor) -> Tensor:
    torch.manual_seed(0)
    student, teacher = tapped(f=own), tapped(f=other)
    module = objective.build(student, teacher)
    terms = module(student, teacher, batch_of(len(own)), Progress())
    return torch.stack(list(terms.values())).sum()


SHAPES = [
    ((4, 3, 8, 8), (4, 6, 4, 4)),  # maps of two sizes
    ((4, 3, 4, 4), (4, 6, 8, 8)),
    ((4, 9, 6), (4, 17, 8)),  # tokens: 3 x 3 patches, and 4 x 4 with a class token
    ((4, 5, 6), (4, 3, 2, 2)),  # tokens with a class token, and maps
]


@every
@pytest.mark.parametrize(("own", "other"), SHAPES)
def test_maps_and_tokens_of_any_size_can_be_matched(
    objective: Any, own: tuple[int, ...], other: tuple[int, ...]
) -> None:
    student, teacher = draw(0, *own).requires_grad_(), draw(1, *other).requires_grad_()
    loss = loss_of(objective, student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@every
def test_weight_0_leaves_the_other_terms_alone(objective: Any) -> None:
    student = draw(0, 4, 3, 4, 4).requires_grad_()
    loss = loss_of(type(objective)(weight=0, **(TAP if hasattr(objective, "student_tap") else TAPS)), student,
                   draw(1, 4, 6, 4, 4))  # fmt: skip
    loss.backward()
    assert loss == 0
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("objective", ALL[:2] + ALL[3:], ids=lambda o: type(o).__name__)
def test_scale_of_either_network_changes_nothing(objective: Any) -> None:
    own, other = draw(0, 4, 3, 4, 4), draw(1, 4, 6, 4, 4)
    torch.testing.assert_close(loss_of(objective, 5 * own, other / 3), loss_of(objective, own, other))


@every
def test_half_precision_of_large_values_is_finite(objective: Any) -> None:
    assert torch.isfinite(loss_of(objective, 200 * draw(0, 4, 3, 4, 4).half(), draw(1, 4, 6, 4, 4).half()))


@every
def test_a_broken_teacher_is_seen(objective: Any) -> None:
    other = draw(1, 4, 6, 4, 4)
    other[0, 0, 0, 0] = torch.nan
    assert loss_of(objective, draw(0, 4, 3, 4, 4), other).isnan()


# Forms of features


def test_tokens_become_a_map_row_by_row() -> None:
    grid = draw(0, 2, 3, 4, 4)
    tokens = grid.flatten(2).mT
    assert torch.equal(as_map(tokens), grid)
    assert torch.equal(as_map(torch.cat([draw(1, 2, 1, 3), tokens], dim=1)), grid)


def test_vectors_are_the_pooled_map_the_class_token_or_the_mean_of_tokens() -> None:
    x = draw(0, 2, 4, 3)
    torch.testing.assert_close(as_vector(x), x.mean(1))
    torch.testing.assert_close(as_vector(as_map(x)), x.mean(1))
    with_class = torch.cat([draw(1, 2, 1, 3), x], dim=1)
    assert torch.equal(as_vector(with_class), with_class[:, 0])
    assert torch.equal(as_vector(x[:, :, :, None, None][:, 0]), x[:, 0])


@pytest.mark.parametrize("tokens", [3, 7, 6 * 6 + 2])
def test_tokens_that_are_no_square_say_so(tokens: int) -> None:
    for form in (as_map, as_vector):
        with pytest.raises(ShapeError, match=f"{tokens} tokens are no square of patches"):
            form(draw(0, 2, tokens, 3))


@pytest.mark.parametrize("objective", [AT, NST, VID])
def test_as_many_taps_in_both(objective: Any) -> None:
    with pytest.raises(ConfigError, match="student_taps names 2 layers but teacher_taps names 1"):
        objective(student_taps=("a", "b"))
    with pytest.raises(ConfigError, match="name one or more in both"):
        objective(student_taps=(), teacher_taps=())


@every
def test_a_missing_tap_is_named_before_the_first_step(objective: Any) -> None:
    given = tapped(g=draw(0, 4, 3, 4, 4))
    with pytest.raises(ShapeError, match="student gives no feature at tap 'f': "):
        objective.build(given, given)


@pytest.mark.parametrize("objective", [AT, NST, VID])
def test_stages_are_summed(objective: Any) -> None:
    own, other = draw(0, 4, 3, 4, 4), draw(1, 4, 6, 4, 4)
    both = objective(student_taps=("f", "g"), teacher_taps=("f", "g"))
    student, teacher = tapped(f=own, g=own), tapped(f=other, g=other)
    torch.manual_seed(0)
    module = both.build(student, teacher)
    if objective is VID:
        module.stages[1].load_state_dict(module.stages[0].state_dict())
    (loss,) = module(student, teacher, batch_of(4), Progress()).values()
    torch.testing.assert_close(loss, 2 * loss_of(objective(**TAPS), own, other))


# Each one's own


def test_rkd_reads_pooled_features() -> None:
    own, other = draw(0, 6, 3, 4, 4), draw(1, 6, 5, 2, 2)
    pooled = own.mean((2, 3)), other.mean((2, 3))
    expected = 25 * losses.distance_relations(*pooled) + 50 * losses.angle_relations(*pooled)
    torch.testing.assert_close(loss_of(RKD(**TAP), own, other), expected)


def test_rkd_leaves_out_what_weighs_nothing() -> None:
    given = tapped(f=draw(0, 4, 3))
    for field, left in (("angle", {"distance"}), ("distance", {"angle"})):
        objective = RKD(**TAP, **{field: 0})
        assert set(objective.terms(given, given, batch_of(4), Progress())) == left


def test_sp_reads_all_of_a_feature() -> None:
    own, other = draw(0, 6, 3, 4, 4), draw(1, 6, 9, 8)
    expected = 3000 * losses.similarity_relations(own.flatten(1), other.flatten(1))
    torch.testing.assert_close(loss_of(SP(**TAP), own, other), expected)


@pytest.mark.parametrize("variance", [1e-4, 1.0, 5000.0])
def test_vid_starts_at_any_variance(variance: float) -> None:
    _, found = Guess(2, 3, variance)(torch.zeros(1, 2, 4, 4))
    torch.testing.assert_close(found, torch.full((3,), variance))


def test_vid_starts_at_its_variance_and_learns_it() -> None:
    own, other = tapped(f=draw(0, 4, 3, 4, 4)), tapped(f=draw(1, 4, 6, 4, 4))
    module = VID(variance=2.5, **TAPS).build(own, other)
    _, variance = module.stages[0](own.features["f"])
    torch.testing.assert_close(variance, torch.full((6,), 2.5))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    before = None
    for _ in range(120):
        (loss,) = module(own, other, batch_of(4), Progress()).values()
        before = before or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean, variance = module.stages[0](own.features["f"])
    error = (mean - other.features["f"]).square().mean((0, 2, 3))
    torch.testing.assert_close(variance, error, rtol=0.3, atol=0)
    assert loss.item() < before


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        (AT, {"power": 0.5}, "power is 0.5"),
        (AT, {"weight": -1}, "weight is -1"),
        (SP, {"weight": float("nan")}, "weight is nan"),
        (RKD, {"angle": -2}, "angle is -2"),
        (NST, {"weight": -1}, "weight is -1"),
        (VID, {"variance": 0}, "variance is 0"),
    ],
)
def test_values_out_of_range_are_named(objective: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(**fields)
