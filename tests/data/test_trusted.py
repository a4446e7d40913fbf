"""Labels that are known to be wrong, and labels that can be trusted."""

from __future__ import annotations

import pytest
import torch

from limbeck.data.digits import Digits
from limbeck.data.images import Splits
from limbeck.data.part import Part
from limbeck.errors import ConfigError
from limbeck.scenarios.static import _held_out

WHOLE = Digits().load().train


def part(**fields: object) -> Splits:
    return Part(data=Digits(), **fields).seeded(3).load()  # type: ignore[arg-type]


def test_wrong_labels_are_marked() -> None:
    found = part(noise=0.2).train
    assert found.noisy is not None
    assert torch.equal(found.noisy, found.labels != WHOLE.labels)
    assert part(per_class=5).train.noisy is None


def test_marks_go_with_their_samples() -> None:
    inner = Part(data=Digits(), noise=0.3, seed=1)
    outer = Part(data=inner, groups=((0, 1), (2, 3)), per_class=40, noise=0.1).seeded(3).load().train
    assert outer.noisy is not None
    assert len(outer.noisy) == len(outer) == 80
    assert 0.25 < outer.noisy.float().mean() < 0.5


def test_trusted_labels_are_right_and_the_stated_share_of_each_class() -> None:
    found = part(noise=0.5, trusted=0.2).train
    assert found.trusted is not None
    assert found.noisy is not None
    assert not (found.trusted & found.noisy).any()
    shares = [found.trusted[WHOLE.labels == k].float().mean() for k in range(10)]
    assert all(0.15 < share < 0.25 for share in shares)
    assert int(found.noisy.sum()) == round(0.5 * int((~found.trusted).sum()))
    assert "20% trusted" in found.name


def test_what_is_trusted_in_a_part_of_a_part() -> None:
    inner = Part(data=Digits(), noise=0.5, trusted=0.5, seed=1)
    before = inner.load().train.trusted
    assert before is not None
    kept = Part(data=inner, labelled=9).seeded(3).load().train.trusted
    assert kept is not None and torch.equal(kept, before)
    both = Part(data=inner, noise=0.2, trusted=0.5).seeded(3).load().train
    assert both.trusted is not None and both.noisy is not None
    assert both.trusted.any() and not (both.trusted & both.noisy).any()
    assert Part(data=inner, noise=0.2).seeded(3).load().train.trusted is None


def test_validation_is_taken_from_trusted_samples() -> None:
    found = part(noise=0.5, trusted=0.2).train
    assert found.trusted is not None
    for share in (0.1, 0.2):
        index, held = _held_out(found, share, seed=4)
        assert found.trusted[held].all()
        assert len(held) == -int(-share * len(found) // 1)
        assert sorted([*index.tolist(), *held.tolist()]) == list(range(len(found)))
    with pytest.raises(ConfigError, match=r"validation is 0\.3, 405 samples, but only 270 are trusted"):
        _held_out(found, 0.3, seed=4)


def test_nothing_trusted_draws_the_same_noise_as_ever() -> None:
    assert torch.equal(part(noise=0.2).train.labels, part(noise=0.2, trusted=0.0).train.labels)
    with pytest.raises(ConfigError, match=r"trusted is 1\.0: allowed are shares"):
        part(trusted=1.0)
