"""AdaSPEC: the tokens in which a draft lags most behind a reference of its size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small
from tests.engine.killing import killed_and_resumed
from tests.selectors import small_texts
from tests.selectors.small_texts import Bigram, Texts

from limbeck import api
from limbeck.contracts import Batch, Outputs, Progress
from limbeck.errors import ConfigError
from limbeck.losses.selective import selective_kl, token_kl
from limbeck.metrics import cost
from limbeck.objectives.divergence import TokenDivergence
from limbeck.selectors.adaspec import AdaSPEC, Lagging

DRAFT, TARGET = Bigram(1), Bigram(2)
GIVEN = Texts().batch(torch.arange(8))


def logits(net: Bigram) -> torch.Tensor:
    said = net(GIVEN)
    assert said.unembedding is not None and said.hidden is not None
    return said.unembedding.logits(said.hidden).detach()


def chosen(reference: Bigram, **fields: Any) -> tuple[torch.Tensor, Lagging]:
    selection = Lagging(AdaSPEC(**fields), reference)
    return selection.weights(GIVEN, DRAFT(GIVEN), TARGET(GIVEN), Progress()), selection


def gaps(reference: Bigram) -> torch.Tensor:
    lags = [token_kl(logits(net), logits(TARGET)) for net in (DRAFT, reference)]
    return lags[0] - lags[1]


def test_the_largest_gaps_are_taken_and_their_weights_keep_the_mean() -> None:
    reference = Bigram(3)
    weights, selection = chosen(reference, fraction=0.4)
    gap, kept = gaps(reference), weights > 0
    count = int(kept.sum())
    assert gap[kept].min() > gap[~kept].max()
    assert count >= math.floor(0.4 * 31) + 1 > count - int((gap[kept] == gap[kept].min()).sum())
    assert not weights.requires_grad
    torch.testing.assert_close(weights[kept], torch.full((count,), 32 / count))
    facts = selection.facts()
    assert (facts["tokens_seen"], facts["tokens_selected"]) == (32, count)
    assert facts["gap"] == pytest.approx(float(gap.mean()), abs=1e-5)
    assert facts["gap_selected"] == pytest.approx(float(gap[kept].mean()), abs=1e-5)


def test_all_are_taken_at_a_fraction_of_one_and_where_the_draft_is_the_reference() -> None:
    assert (chosen(Bigram(3), fraction=1.0)[0] == 1).all()
    assert (chosen(Bigram(1), fraction=0.4)[0] == 1).all()


def test_the_bottom_is_what_the_top_leaves() -> None:
    top, bottom = (chosen(Bigram(3), fraction=0.4, bottom=b)[0] > 0 for b in (False, True))
    assert not (top & bottom).any()
    assert gaps(Bigram(3))[bottom].max() < gaps(Bigram(3))[top].min()


def test_dividing_by_all_leaves_the_weights_at_one() -> None:
    weights, _ = chosen(Bigram(3), fraction=0.4, normalise="all")
    assert set(weights.tolist()) == {0.0, 1.0}


def test_gradient_is_that_of_the_selected_tokens_alone() -> None:
    weights, _ = chosen(Bigram(3), fraction=0.4)
    student = DRAFT(GIVEN)
    assert student.hidden is not None and student.unembedding is not None
    batch = Batch(**{**{f: getattr(GIVEN, f) for f in GIVEN.__dataclass_fields__}, "weight": weights})
    loss = TokenDivergence().terms(student, TARGET(GIVEN), batch, Progress())["divergence"]
    (grad,) = torch.autograd.grad(loss, student.hidden)
    kept = weights > 0
    slope = (logits(DRAFT).softmax(-1) - logits(TARGET).softmax(-1)) / kept.sum()
    wanted = torch.where(kept[:, None], slope @ student.unembedding.weight, 0)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
    plain = selective_kl(logits(DRAFT), logits(TARGET), logits(Bigram(3)), 0.4)
    torch.testing.assert_close(loss.detach(), plain, rtol=1e-5, atol=0)


def test_a_reference_that_is_no_number_is_not_passed_over() -> None:
    broken = Bigram(3)
    torch.nn.init.constant_(broken.head, math.nan)
    weights, _ = chosen(broken)
    assert weights.isnan().all()


def test_top_tokens_of_the_target_will_do() -> None:
    shares, ids = logits(TARGET).log_softmax(-1).topk(small_texts.VOCABULARY - 1)
    top = Outputs(torch.empty(32, 0), top=(ids, shares))
    selection = Lagging(AdaSPEC(), Bigram(3))
    found = selection.weights(GIVEN, DRAFT(GIVEN), top, Progress())
    assert torch.equal(found > 0, chosen(Bigram(3))[0] > 0)  # one token is left out, which the tail is


def test_the_reference_starts_where_the_student_starts(tmp_path: Path) -> None:
    lessons = small_texts.course(tmp_path)
    with torch.no_grad():
        for parameter in lessons.student.parameters():
            parameter.add_(0.1)  # as a student has that began with the texts alone
    start = {name: value.clone() for name, value in lessons.student.state_dict().items()}
    same, other = (lessons.probe(name, 0, same_start=same) for name, same in (("a", True), ("b", False)))
    assert all(torch.equal(value, start[name]) for name, value in same.state_dict().items())
    assert not all(torch.equal(value, start[name]) for name, value in other.state_dict().items())
    assert same is not lessons.student


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "sets", [(), ("scenario.start_epochs=1", "objective=[{name: first, scaling: power}]")]
)
def test_killed_and_resumed(tmp_path: Path, sets: tuple[str, ...]) -> None:
    asked = small_texts.recipe(tmp_path, "selector={name: adaspec, epochs: 2}", *sets)
    found = api.run(asked, out=tmp_path / "whole", quiet=True)
    facts = found.data["selection"]
    assert 0.4 < facts["share"] < 0.45
    assert facts["gap_selected"] > facts["gap"]
    small.assert_same(killed_and_resumed(asked, tmp_path / "cut", at=28), tmp_path / "whole")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"fraction": 1.1}, "fraction is 1.1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"normalise": "al"}, "did you mean 'all'"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AdaSPEC(**fields)


def test_it_needs_a_target() -> None:
    course: Any = Texts()
    course.teacher = None
    with pytest.raises(ConfigError, match="teacher is none"):
        AdaSPEC().prepare(course)
