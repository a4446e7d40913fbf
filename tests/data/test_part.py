from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.data.batches import Batches
from limbeck.data.digits import Digits
from limbeck.data.images import ImageSet, Splits
from limbeck.data.part import Part
from limbeck.data.pool import Pool
from limbeck.data.together import Going, Together
from limbeck.errors import ConfigError, DataError

WHOLE = Digits().load()


def part(**fields: object) -> Splits:
    return Part(data=Digits(), **fields).seeded(3).load()  # type: ignore[arg-type]


def pairs(images: ImageSet) -> list[tuple[bytes, int]]:
    pixels = images.read(np.arange(len(images)))
    return [(image.tobytes(), int(label)) for image, label in zip(pixels, images.labels, strict=True)]


def counts(images: ImageSet) -> list[int]:
    return torch.bincount(images.labels, minlength=len(images.classes)).tolist()


def test_nothing_asked_for_changes_nothing_but_the_fingerprint() -> None:
    found = part()
    assert torch.equal(found.train.labels, WHOLE.train.labels)
    assert np.array_equal(np.asarray(found.train.images), np.asarray(WHOLE.train.images))
    assert found.train.name == WHOLE.train.name
    assert found.train.labelled is None


def test_as_many_of_each_class_as_asked_for() -> None:
    found = part(per_class=10)
    assert counts(found.train) == [10] * 10
    assert len(found.test) == len(WHOLE.test)
    assert found.train.name == "digits (10 per class) train"


def test_kept_images_are_images_of_the_whole_with_their_own_labels() -> None:
    found = part(per_class=3)
    rows = dict(pairs(WHOLE.train))
    assert all(rows[image] == label for image, label in pairs(found.train))


def test_a_long_tail_falls_from_class_to_class_to_the_stated_ratio() -> None:
    found = counts(part(per_class=90, imbalance=30).train)
    assert found[0] == 90
    assert found[-1] == 3
    assert found == sorted(found, reverse=True)


def test_noise_changes_the_stated_share_of_labels_and_always_to_another_class() -> None:
    found = part(noise=0.2)
    wrong = found.train.labels != WHOLE.train.labels
    assert int(wrong.sum()) == round(0.2 * len(wrong))
    assert torch.equal(found.test.labels, WHOLE.test.labels)


def test_groups_merge_classes_in_both_splits_and_leave_the_others_out() -> None:
    found = part(groups=((0, 2), (1, 3, 5)))
    assert found.train.classes == ("0+2", "1+3+5")
    for images, whole in ((found.train, WHOLE.train), (found.test, WHOLE.test)):
        assert len(images) == int(torch.isin(whole.labels, torch.tensor([0, 1, 2, 3, 5])).sum())
        assert counts(images)[0] == int(torch.isin(whole.labels, torch.tensor([0, 2])).sum())


def test_labels_are_known_for_the_stated_number_of_each_class() -> None:
    found = part(labelled=4)
    assert found.train.labelled is not None
    assert torch.bincount(found.train.labels[found.train.labelled]).tolist() == [4] * 10
    batches = Batches(found.train, batch_size=50, size=8, channels=1)
    batch = next(iter(batches.epoch(0)))
    assert batch.labelled is not None
    assert torch.equal(batch.labelled, found.train.labelled[batch.index])


def test_labels_that_are_hidden_stay_hidden_in_a_part_of_a_part() -> None:
    inner = Part(data=Digits(), labelled=4, seed=1)
    hidden = inner.load().train.labelled
    assert hidden is not None
    spoilt = Part(data=inner, noise=0.1).seeded(3).load().train.labelled
    assert spoilt is not None and torch.equal(spoilt, hidden)
    few = Part(data=inner, groups=((0, 1), (2, 3)), labelled=3).seeded(3).load().train
    assert few.labelled is not None
    assert torch.bincount(few.labels[few.labelled]).tolist() == [3, 3]
    cut = Part(data=inner, per_class=40).seeded(3).load().train
    assert cut.labelled is not None and len(cut.labelled) == 400
    assert 0 < int(cut.labelled.sum()) < 40


def test_a_pool_without_labels_has_no_marks_of_them() -> None:
    found = Pool(data=Digits(), pool=Part(data=Digits(), noise=0.5, trusted=0.2)).seeded(3).load().train
    assert found.noisy is None and found.trusted is None
    assert found.labelled is not None and not found.labelled.any()


def test_the_runs_seed_decides_what_is_drawn_unless_one_is_set() -> None:
    one, again, other = (Part(data=Digits(), per_class=5).seeded(seed).load() for seed in (1, 1, 2))
    assert one.train.fingerprint == again.train.fingerprint != other.train.fingerprint
    assert np.array_equal(np.asarray(one.train.images), np.asarray(again.train.images))
    assert not np.array_equal(np.asarray(one.train.images), np.asarray(other.train.images))
    assert Part(data=Digits(), seed=7).seeded(1).seed == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"per_class": 0}, "per_class is 0: allowed are values of at least 1"),
        ({"noise": 1.0}, "noise is 1.0: allowed are shares"),
        ({"imbalance": 0.5}, "imbalance is 0.5"),
        ({"groups": ((0, 1),)}, "groups must be at least two"),
        ({"groups": ((0,), (0, 1))}, "name no class twice"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        part(**fields)


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(DataError, match="per_class is 5000 but class 0 has"):
        part(per_class=5000)
    with pytest.raises(ConfigError, match=r"groups name class 11 but digits train has 0\.\.9"):
        part(groups=((0,), (11,)))


def batches(count: int, size: int, first: int = 0) -> Batches:
    return Batches(WHOLE.train, torch.arange(first, first + count), batch_size=size, size=8, channels=1)


def test_going_round_gives_the_stated_steps_and_all_samples_alike() -> None:
    going = Going(batches(10, 4), steps=7)
    seen = torch.cat([batch.index for epoch in range(3) for batch in going.epoch(epoch)])
    assert len(list(going.epoch(0))) == 7
    assert torch.bincount(seen).tolist() == [7] * 10  # 21 steps are 7 rounds of three batches


def test_joined_sources_can_be_entered_at_any_step() -> None:
    together = Together(batches(6, 2), batches(20, 5, first=100))
    whole = list(together.epoch(1))
    late = list(together.epoch(1, start=2))
    assert together.steps == len(whole) == 4
    assert all(len(batch.index) == 7 for batch in whole)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(whole[2:], late, strict=True))
    assert sorted(int(i) for b in whole for i in b.index if i >= 100) == list(range(100, 120))
