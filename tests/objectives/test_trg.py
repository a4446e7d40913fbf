"""What must be true of the objective trg."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Facts, Outputs, Progress
from limbeck.errors import ConfigError, ShapeError
from limbeck.objectives.trg import TRG, sample_tokens

MAPS = TRG(student_tap="s", teacher_tap="t")
AT = Progress(step=2, steps=8, epoch=1, epochs=4)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(**features: Tensor) -> Outputs:
    return Outputs(logits=torch.zeros(len(next(iter(features.values()))), 2), features=features)


def batch(count: int) -> Batch:
    index = torch.arange(count)
    return Batch(inputs=index, labels=0 * index, index=index, view=0 * index)


def module(objective: TRG, own: Tensor, other: Tensor, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(0)
    return objective.build(outputs(s=own), outputs(t=other), Facts(seed=seed))


def terms(objective: TRG, own: Tensor, other: Tensor, at: Progress = AT, seed: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = module(objective, own, other, seed)(
        outputs(s=own), outputs(t=other), batch(len(own)), at
    )
    return found


def test_the_same_features_leave_the_global_term_alone() -> None:
    same = draw(0, 3, 5, 4, 4)
    found = terms(MAPS, same, same)
    assert found["local"] == found["contextual"] == 0
    assert found["global"] > 0


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_a_term_without_weight_is_not_there(name: str) -> None:
    own, other = draw(0, 3, 5, 4, 4), draw(1, 3, 7, 4, 4)
    gone = {"alpha": "contextual", "beta": "local", "gamma": "global"}[name]
    assert set(terms(MAPS, own, other)) == {"contextual", "local", "global"}
    assert set(terms(replace(MAPS, **{name: 0.0}), own, other)) == {"contextual", "local", "global"} - {gone}


def test_without_weights_nothing_is_left_to_learn() -> None:
    own, other = draw(0, 3, 5, 4, 4), draw(1, 3, 7, 4, 4)
    none = replace(MAPS, alpha=0.0, beta=0.0, gamma=0.0)
    assert terms(none, own, other) == {}
    assert not list(module(none, own, other).parameters())
    contextual = replace(MAPS, beta=0.0, gamma=0.0)
    assert not list(module(contextual, own, other).parameters())


def test_the_terms_are_those_of_the_losses() -> None:
    own, other = draw(0, 3, 5, 4, 4), draw(1, 3, 7, 4, 4)
    plan = replace(MAPS, sampled=16, neighbours=3)
    found, tokens = terms(plan, own, other), [losses.tokenise(x) for x in (own, other)]
    torch.testing.assert_close(found["contextual"], losses.contextual(*tokens))
    graphs = [losses.knn_affinity(torch.nn.functional.normalize(x.flatten(0, 1), dim=-1), 3) for x in tokens]
    torch.testing.assert_close(found["local"], losses.local_graph(*graphs))


def test_the_teacher_learns_nothing_but_its_projection() -> None:
    own, other = draw(0, 3, 5, 4, 4).requires_grad_(), draw(1, 3, 7, 4, 4).requires_grad_()
    made = module(MAPS, own, other)
    sum(made(outputs(s=own), outputs(t=other), batch(3), AT).values()).backward()
    assert other.grad is None
    assert own.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in made.parameters())


def test_both_networks_give_the_same_places_and_each_step_others() -> None:
    """The teacher's tokens are the student's, widened: sampled apart they would not find each other."""
    own = draw(0, 3, 8, 6, 6)
    plan = replace(MAPS, sampled=4, warm=0.01, cold=0.01, width=8)
    made = module(plan, own, own)
    with torch.no_grad():
        made.project[1].weight.copy_(made.project[0].weight)
    said = outputs(s=own), outputs(t=own), batch(3)
    assert made(*said, AT)["global"] < 0.01
    values = {made(*said, replace(AT, step=step))["global"].item() for step in (2, 2, 3)}
    assert len(values) == 2


def test_places_are_drawn_without_repetition_for_each_image() -> None:
    places = sample_tokens(torch.zeros(3, 10, 2), 4, 1024, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 4 for row in places.tolist())
    assert len({tuple(row) for row in places.tolist()}) > 1


def test_what_is_drawn_depends_on_seed_task_and_step_and_not_on_the_order() -> None:
    own, other = draw(0, 4, 5, 4, 4), draw(1, 4, 7, 4, 4)
    plan, order = replace(MAPS, sampled=3), torch.tensor([2, 0, 3, 1])
    plain, again = terms(plan, own, other, seed=7), terms(plan, own, other, seed=7)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    for elsewhere in ({"seed": 8}, {"at": replace(AT, step=3)}, {"at": replace(AT, task=1)}):
        assert terms(plan, own, other, **{"seed": 7, **elsewhere})["local"] != plain["local"]
    given = replace(batch(4), index=order)
    shuffled = module(plan, own, other, 7)(outputs(s=own[order]), outputs(t=other[order]), given, AT)
    for name in plain:
        torch.testing.assert_close(shuffled[name], plain[name])


@pytest.mark.parametrize(("count", "most", "each"), [(4, 1024, 4), (99, 1024, 10), (8, 18, 6), (8, 2, 1)])
def test_the_graph_is_bounded(count: int, most: int, each: int) -> None:
    assert sample_tokens(torch.zeros(3, 10, 2), count, most, torch.Generator()).shape == (3, each)


def test_the_temperature_falls_over_the_epochs() -> None:
    course = [MAPS.temperature(Progress(epoch=e, epochs=10)) for e in range(11)]
    assert course[0] == 1
    assert course[10] == pytest.approx(0.1)
    assert course[5] == pytest.approx(0.55)
    assert course == sorted(course, reverse=True)
    assert replace(MAPS, cold=1.0).temperature(Progress(epoch=7, epochs=10)) == 1


def test_larger_maps_are_pooled_and_tokens_make_a_grid() -> None:
    own, other = draw(0, 3, 5, 2, 2), draw(1, 3, 7, 4, 4)
    pooled = torch.nn.functional.avg_pool2d(other, 2)
    for plan in (MAPS, replace(MAPS, patch=2)):
        small, large = terms(plan, own, pooled), terms(plan, own, other)
        assert all(torch.equal(small[name], large[name]) for name in small)
    transformer = torch.cat([draw(2, 3, 1, 5), own.flatten(2).mT], dim=1)
    assert terms(MAPS, transformer, other)["contextual"] == terms(MAPS, own, other)["contextual"]


def test_transformers_need_no_square_but_the_same_places() -> None:
    found = terms(MAPS, draw(0, 3, 7, 5), draw(1, 3, 7, 4))
    assert all(torch.isfinite(term) for term in found.values())
    with pytest.raises(ShapeError, match="student_prefix"):
        terms(MAPS, draw(0, 3, 7, 5), draw(1, 3, 5, 4))
    with pytest.raises(ShapeError, match="student_prefix"):
        terms(MAPS, draw(0, 3, 1, 5), draw(1, 3, 1, 4))
    with pytest.raises(ShapeError, match="patch is 3"):
        terms(replace(MAPS, patch=3), draw(0, 3, 5, 2, 2), draw(1, 3, 7, 4, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -1}, "alpha is -1"),
        ({"sigma": 0}, "sigma is 0"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"warm": 0.1, "cold": 0.5}, "cold is 0.5 but warm is 0.1"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TRG(**fields)
