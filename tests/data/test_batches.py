from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.pictures import Counting, counting, image_set

from limbeck.contracts import Batch
from limbeck.data.batches import Batches
from limbeck.data.images import ImageSet
from limbeck.data.views import Views
from limbeck.errors import ConfigError, DataError

AUGMENTED = Views(scale=(0.5, 1.3), degrees=10, noise=0.05)
REPLAYED = Views(scale=(0.5, 1.3), degrees=10, noise=0.05, count=2)


def plan(images: ImageSet | None = None, **changes: Any) -> Batches:
    how: dict[str, Any] = {"batch_size": 7, "size": 6, "channels": 1, **changes}
    return Batches(images or image_set(), **how)


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in ("inputs", "labels", "index", "view")
    )


@given(
    start=st.integers(0, 8),
    epoch=st.integers(0, 5),
    views=st.sampled_from([Views(), AUGMENTED, REPLAYED]),
    limit=st.sampled_from([0, 2**20]),
    lazy=st.booleans(),
)
def test_an_epoch_can_be_entered_at_any_step(
    start: int, epoch: int, views: Views, limit: int, lazy: bool
) -> None:
    images = counting(image_set())[0] if lazy else image_set()
    whole = list(plan(image_set(), views=views, seed=3).epoch(epoch))
    assert len(whole) == 6
    assert equal(
        list(plan(images, views=views, seed=3, limit=limit).epoch(epoch, start=start)), whole[start:]
    )


@pytest.mark.parametrize("views", [Views(), REPLAYED])
def test_what_is_kept_is_what_would_be_rendered(views: Views) -> None:
    kept, made = plan(views=views, limit=2**20), plan(views=views, limit=0)
    for epoch in (0, 1, 2, 0):
        assert equal(list(kept.epoch(epoch)), list(made.epoch(epoch)))


def test_an_epoch_goes_over_every_sample_once_in_its_own_order() -> None:
    batches = plan()
    orders = [torch.cat([batch.index for batch in batches.epoch(epoch)]).tolist() for epoch in range(3)]
    assert [sorted(order) for order in orders] == [list(range(40))] * 3
    assert len({tuple(order) for order in orders}) == 3
    still = plan(shuffle=False)
    assert torch.cat([batch.index for batch in still.epoch(1)]).tolist() == list(range(40))
    assert batches.steps == 6
    assert plan(drop_last=True).steps == 5 == len(list(plan(drop_last=True).epoch(0)))


def test_labels_follow_the_given_numbering_and_inputs_their_samples() -> None:
    images = image_set()
    numbering = 3 - images.labels
    for batch in plan(images, labels=numbering, mean=(0.5,), std=(0.25,)).epoch(0):
        assert torch.equal(batch.labels, numbering[batch.index])
        pixels = torch.from_numpy(images.read(batch.index.numpy())).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(batch.inputs, (pixels - 0.5) / 0.25)


def test_mean_and_std_per_channel() -> None:
    images = image_set(channels=3)
    batch = next(
        iter(plan(images, channels=3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0), shuffle=False).epoch(0))
    )
    pixels = torch.from_numpy(images.read(np.arange(7))).permute(0, 3, 1, 2).float() / 255
    for channel, (mean, std) in enumerate(((0.1, 1.0), (0.2, 2.0), (0.3, 4.0))):
        assert torch.allclose(batch.inputs[:, channel], (pixels[:, channel] - mean) / std)


def test_views_are_numbered_for_the_caches() -> None:
    replayed = plan(views=REPLAYED)
    assert [next(iter(replayed.epoch(epoch))).view.tolist() for epoch in range(3)] == [
        [0] * 7,
        [1] * 7,
        [0] * 7,
    ]
    first, again = (list(replayed.epoch(epoch)) for epoch in (0, 2))
    pictures = {int(i): x for batch in first for i, x in zip(batch.index, batch.inputs, strict=True)}
    for batch in again:
        for index, inputs in zip(batch.index, batch.inputs, strict=True):
            assert torch.equal(inputs, pictures[int(index)])


def test_a_subset_gives_the_same_pictures_and_shares_what_is_kept() -> None:
    images, source = counting(image_set())
    batches = plan(images, views=REPLAYED)
    whole = {int(i): x for b in batches.epoch(0) for i, x in zip(b.index, b.inputs, strict=True)}
    source.reads[:] = 0
    part = batches.subset(torch.tensor([30, 2, 17]))
    assert (part.count, part.steps) == (3, 1)
    (batch,) = part.epoch(0)
    assert sorted(batch.index.tolist()) == [2, 17, 30]
    assert all(torch.equal(x, whole[int(i)]) for i, x in zip(batch.index, batch.inputs, strict=True))
    assert source.reads.sum() == 0
    with pytest.raises(DataError, match="sample 40 is not among"):
        batches.subset(torch.tensor([40]))
    with pytest.raises(DataError, match="index is empty"):
        batches.subset(torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("views", [Views(), REPLAYED, AUGMENTED])
def test_a_lazy_source_is_read_once_where_memory_allows(views: Views) -> None:
    images, source = counting(image_set())
    batches = plan(images, index=torch.arange(0, 40, 2), views=views)
    for epoch in range(4):
        list(batches.epoch(epoch))
    reads = 2 if views is REPLAYED else 1  # each kept view is rendered from one reading
    assert source.reads[::2].tolist() == [reads] * 20
    assert source.reads[1::2].sum() == 0
    thrifty = plan(images, views=views, limit=0)
    source.reads[:] = 0
    for epoch in range(2):
        list(thrifty.epoch(epoch))
    assert source.reads.tolist() == [2] * 40


def test_leaving_an_epoch_early_stops_reading() -> None:
    images, source = counting(image_set(count=400))
    batches = plan(images, views=AUGMENTED, limit=0)
    epoch = batches.epoch(0)
    next(epoch)
    epoch.close()  # type: ignore[attr-defined]
    assert source.reads.sum() < 400


def test_an_error_of_the_source_comes_through() -> None:
    class Broken(Counting):
        def read(self, positions: Any) -> Any:
            raise DataError("photo.png cannot be read")

    good = image_set()
    images = ImageSet("b", Broken(good.read(np.arange(40))), good.labels, good.classes, "", "", "x")
    with pytest.raises(DataError, match=r"photo\.png"):
        list(plan(images).epoch(0))


def test_describe_changes_with_all_that_pixels_depend_on() -> None:
    kinds = [
        plan(views=AUGMENTED),
        plan(views=AUGMENTED, seed=1),
        plan(views=AUGMENTED, size=8),
        plan(views=AUGMENTED, mean=(0.5,)),
        plan(image_set(seed=9), views=AUGMENTED),
        plan(views=REPLAYED),
    ]
    assert len({json.dumps(kind.describe()) for kind in kinds}) == len(kinds)
    assert plan(seed=0).describe() == plan(seed=1, batch_size=3).describe()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"batch_size": 41, "drop_last": True}, ConfigError, "only 40 samples"),
        ({"size": 0}, ConfigError, "size is 0"),
        ({"mean": (0.0, 1.0)}, ConfigError, "mean has 2 entries"),
        ({"std": (0.0,)}, ConfigError, "above 0"),
        ({"index": torch.tensor([], dtype=torch.int64)}, DataError, "index is empty"),
        ({"index": torch.tensor([40])}, DataError, "sample 40 is not in 0..39"),
        ({"index": torch.tensor([-1])}, DataError, "sample -1 is not in 0..39"),
        ({"labels": torch.full((40,), 4)}, DataError, "label 4 is out of range"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, DataError, "3 labels for 40 images"),
    ],
)
def test_wrong_plans_are_refused_in_one_line(changes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        plan(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
