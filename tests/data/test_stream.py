from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.pictures import counting, image_set, splits

from limbeck.data.batches import Batches
from limbeck.data.images import Splits, from_arrays
from limbeck.data.stream import Stream
from limbeck.errors import ConfigError, DataError


@given(classes=st.integers(1, 9), tasks=st.integers(1, 9), seed=st.integers(0, 50))
def test_tasks_part_the_samples_and_own_consecutive_class_ids(classes: int, tasks: int, seed: int) -> None:
    if tasks > classes:
        tasks = classes
    data = splits(classes=classes, train=27, test=18)
    stream = Stream(data, tasks, seed=seed)
    assert sorted(stream.class_order) == list(range(classes))
    assert sum(stream.sizes) == classes
    assert max(stream.sizes) - min(stream.sizes) <= 1
    start = 0
    for task in stream:
        assert task.start == start
        assert task.classes == stream.classes[task.start : task.stop]
        assert set(stream.train_labels[task.train_index].tolist()) == set(range(task.start, task.stop))
        assert set(stream.test_labels[task.test_index].tolist()) == set(range(task.start, task.stop))
        start = task.stop
    assert start == classes
    assert torch.cat([task.train_index for task in stream]).sort().values.tolist() == list(range(27))
    assert torch.cat([task.test_index for task in stream]).sort().values.tolist() == list(range(18))


def test_labels_are_renumbered_in_the_order_of_arrival() -> None:
    data = splits()
    stream = Stream(data, 2, class_order=[2, 0, 3, 1], sizes=[1, 3])
    assert stream.classes == ("c2", "c0", "c3", "c1")
    order = torch.tensor(stream.class_order)
    assert torch.equal(order[stream.train_labels], data.train.labels)
    assert torch.equal(order[stream.test_labels], data.test.labels)
    assert [(t.number, t.start, t.stop) for t in stream] == [(0, 0, 1), (1, 1, 4)]


def test_natural_order_and_seeded_orders() -> None:
    data = splits()
    assert Stream(data, 2, class_order="natural").class_order == [0, 1, 2, 3]
    assert Stream(data, 2, seed=3).class_order == Stream(data, 4, seed=3).class_order
    assert len({tuple(Stream(data, 2, seed=seed).class_order) for seed in range(8)}) > 1


def test_seen_gathers_the_test_samples_of_all_tasks_so_far() -> None:
    stream = Stream(splits(), 3, class_order="natural")
    for number in range(3):
        seen = torch.cat([stream.task(t).test_index for t in range(number + 1)]).sort().values
        assert torch.equal(stream.seen(number), seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": 5}, "scenario.tasks is 5 but must lie in 1..4"),
        ({"tasks": 0}, "scenario.tasks is 0"),
        ({"tasks": 2, "class_order": [0, 1, 2]}, "each of 0..3 once"),
        ({"tasks": 2, "class_order": [0, 1, 2, 2]}, "each of 0..3 once"),
        ({"tasks": 2, "class_order": [0, 1, 2, 4]}, "each of 0..3 once"),
        ({"tasks": 2, "class_order": "random"}, "'random' but must be 'natural'"),
        ({"tasks": 2, "sizes": [2, 3]}, "sum to 4"),
        ({"tasks": 2, "sizes": [4, 0]}, "at least 1"),
        ({"tasks": 2, "sizes": [2, 1, 1]}, "must be 2 numbers"),
        ({"tasks": 1, "sizes": []}, "must be 1 numbers"),
    ],
)
def test_bad_streams_are_refused_in_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Stream(splits(), **arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("empty", ["train", "test"])
def test_an_empty_task_is_refused_by_name(empty: str) -> None:
    full = image_set(classes=3)
    held = np.flatnonzero(full.labels.numpy() != 2)
    few = from_arrays(
        "few", full.read(held), full.labels[held].numpy(), full.classes, licence="none", source="drawn"
    )
    data = Splits(few, full) if empty == "train" else Splits(full, few)
    with pytest.raises(DataError, match=rf"task 2 \(classes c2\) has no {empty} samples"):
        Stream(data, 3, class_order="natural")
    assert len(Stream(data, 2, class_order="natural", sizes=[1, 2])) == 2


def test_a_task_outside_the_stream() -> None:
    with pytest.raises(IndexError, match=r"task 2 is not in 0\.\.1"):
        Stream(splits(), 2).task(2)


@pytest.mark.parametrize("limit", [0, 2**20])
def test_no_train_sample_of_another_task_is_read(limit: int) -> None:
    data = splits(classes=4, train=48)
    train, source = counting(data.train)
    stream = Stream(Splits(train, data.test), 4, seed=1)
    assert source.reads.sum() == 0
    for task in stream:
        source.reads[:] = 0
        batches = Batches(
            train, task.train_index, stream.train_labels, batch_size=5, size=6, channels=1, limit=limit
        )
        for epoch in range(2):
            for batch in batches.epoch(epoch):
                assert ((batch.labels >= task.start) & (batch.labels < task.stop)).all()
        assert np.flatnonzero(source.reads).tolist() == task.train_index.tolist()
