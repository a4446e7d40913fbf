"""DDK: domains in which the student lags behind are drawn more often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small
from tests.engine.killing import killed_and_resumed
from tests.selectors import small_texts
from tests.selectors.small_texts import Bigram, Texts

from limbeck import api
from limbeck.errors import ConfigError, DataError, NonFiniteError
from limbeck.metrics import cost
from limbeck.metrics.domains import initial_factor, update_factor
from limbeck.selectors.ddk import DDK, Mixture


def mixture(course: Any, **fields: Any) -> Mixture:
    found = DDK(**fields).prepare(course)
    assert isinstance(found, Mixture)
    return found


def drawn(selection: Mixture, course: Texts, epoch: int) -> torch.Tensor:
    return selection.indices(course.index, course.labels[course.index], epoch, torch.Generator())


def perplexity(net: Bigram, course: Texts, domain: int) -> float:
    """By a plain loop over the held-out rows of a domain."""
    total, count = 0.0, 0
    for row in course.held_out[course.labels[course.held_out] == domain]:
        ids = course.ids[row]
        for place in range(1, small_texts.LENGTH):
            said = (net.head @ net.embedding[ids[place]]).log_softmax(0)
            total, count = total - said[ids[place + 1]].item(), count + 1
    return float(torch.tensor(total / count).exp())


def test_perplexities_are_pooled_over_the_held_out_tokens_of_a_domain() -> None:
    course = Texts()
    selection = mixture(course)
    own = [perplexity(course.student, course, domain) for domain in (0, 1)]
    assert selection.interval(0)["perplexity"] == pytest.approx(own, rel=1e-5)
    others = [perplexity(course.teacher, course, domain) for domain in (0, 1)]  # type: ignore[arg-type]
    assert selection.teacher == pytest.approx(others, rel=1e-5)


def test_the_shares_follow_the_equations() -> None:
    course = Texts()
    selection = mixture(course, alpha=0.3)
    teacher = torch.tensor(selection.teacher, dtype=torch.float64)
    first = torch.tensor(selection.interval(0)["perplexity"], dtype=torch.float64)
    shares = initial_factor(first, teacher)
    assert selection.interval(0)["shares"] == pytest.approx(shares.tolist())
    drawn(selection, course, 0)
    course.student = Bigram(9)
    second = torch.tensor(selection.interval(1)["perplexity"], dtype=torch.float64)
    assert not torch.allclose(second, first)
    expected = update_factor(shares, second, teacher, 0.3)
    assert selection.interval(1)["shares"] == pytest.approx(expected.tolist())
    assert sum(selection.interval(1)["shares"]) == pytest.approx(1)


def test_the_other_rules() -> None:
    course = Texts()
    own, other = torch.tensor([4.0, 2.0]).double(), torch.tensor([2.0, 2.0]).double()
    sizes = [30, 10]
    last = torch.tensor([0.9, 0.1]).double()
    assert DDK(rule="equal").shares(last, own, other, sizes).tolist() == [0.5, 0.5]
    assert DDK(rule="size").shares(None, own, other, sizes).tolist() == [0.75, 0.25]
    plain = initial_factor(own, other)
    assert torch.equal(DDK(rule="plain").shares(last, own, other, sizes), plain)
    assert torch.equal(DDK().shares(None, own, other, sizes), plain)
    assert DDK(first="equal").shares(None, own, other, sizes).tolist() == [0.5, 0.5]
    assert DDK(alpha=0.0).shares(last, own, other, sizes).tolist() == [0.5, 0.5]
    assert mixture(course, rule="size").interval(0)["shares"] == [0.75, 0.25]


def test_an_interval_has_as_many_samples_as_its_steps_and_the_domains_their_shares() -> None:
    course = Texts(epoch_samples=2000)
    selection = mixture(course)
    found = drawn(selection, course, 0)
    assert len(found) == 2000
    share = float((course.labels[found] == 1).double().mean())
    assert share == pytest.approx(selection.interval(0)["shares"][1], abs=0.04)
    counts = torch.bincount(found, minlength=40)
    for domain in (0, 1):  # items in turn, and an exhausted domain from its beginning
        own = counts[course.labels[:40] == domain]
        assert own.max() - own.min() <= 1


def test_the_next_interval_goes_on_with_unused_samples() -> None:
    course = Texts(epoch_samples=8)
    selection = mixture(course, rule="equal")
    seen = torch.cat([drawn(selection, course, epoch) for epoch in range(3)])
    first = seen[course.labels[seen] == 0]
    assert len(first.unique()) == len(first)


def test_a_resumed_run_draws_the_same_without_looking_again() -> None:
    course = Texts()
    whole = mixture(course)
    wanted = [drawn(whole, course, epoch) for epoch in range(4)]
    again = Texts()
    again.kept = dict(course.kept)
    again.student, again.teacher = Bigram(77), Bigram(78)  # which must not be asked
    resumed = mixture(again)
    assert torch.equal(drawn(resumed, again, 3), wanted[3])
    assert again.student.asked == again.teacher.asked == 0


def test_the_student_is_left_as_it_was() -> None:
    course = Texts()
    selection = mixture(course)
    for training in (True, False):
        course.student.train(training)
        course.kept.pop("ddk-0", None)
        rng = torch.get_rng_state()
        selection.interval(0)
        assert course.student.training is training
        assert torch.equal(torch.get_rng_state(), rng)


def test_facts_tell_each_interval_and_where_it_ends() -> None:
    course = Texts()
    selection = mixture(course)
    for epoch in range(3):
        drawn(selection, course, epoch)
    facts = selection.facts()
    assert len(facts["shares"]) == 3
    assert len(facts["ratios"]) == 4
    assert facts["sizes"] == [30, 10]
    assert facts["ratio_max"] == max(facts["ratios"][-1]) >= facts["ratio_mean"]
    restored = mixture(course)
    restored.load_state_dict(selection.state_dict())
    assert restored.facts() == facts


def test_one_domain_has_all() -> None:
    course = Texts(domains=1)
    assert mixture(course).interval(0)["shares"] == [1.0]


def test_fewer_validation_samples_are_the_first_ones() -> None:
    assert mixture(Texts(), validation=1).watched.tolist() == [40, 43]
    assert len(mixture(Texts(), validation=None).watched) == 10


def test_a_domain_without_validation_or_with_a_broken_model_is_refused() -> None:
    course = Texts()
    course.held_out = course.held_out[course.labels[course.held_out] == 0]
    with pytest.raises(DataError, match="domain 1 has no validation tokens"):
        mixture(course)
    broken = Texts()
    torch.nn.init.constant_(broken.student.head, torch.nan)  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match="perplexity of domain 0"):
        mixture(broken).interval(0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.mark.usefixtures("quick")
def test_killed_and_resumed(tmp_path: Path) -> None:
    asked = small_texts.recipe(tmp_path, "selector=ddk", "engine.checkpoint_seconds=0")
    found = api.run(asked, out=tmp_path / "whole", quiet=True)
    assert len(found.data["selection"]["shares"]) == 2
    for at in (14, 20):  # in the first interval, and where the second one's perplexities are kept
        small.assert_same(killed_and_resumed(asked, tmp_path / f"cut{at}", at=at), tmp_path / "whole")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rule": "smoth"}, "did you mean 'smooth'"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"first": "random"}, "factor"),
        ({"validation": 0}, "validation is 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DDK(**fields)


def test_it_needs_a_teacher() -> None:
    course: Any = Texts()
    course.teacher = None
    with pytest.raises(ConfigError, match="teacher is none"):
        DDK().prepare(course)
