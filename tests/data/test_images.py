from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.data.pictures import counting, image_set

from limbeck.data.images import Dataset, ImageSet, Splits, from_arrays, stratified
from limbeck.errors import DataError


def build(images: np.ndarray, labels: object, classes: int = 2) -> ImageSet:
    names = [str(c) for c in range(classes)]
    return from_arrays("some", images, np.asarray(labels), names, licence="none", source="here")


def test_float_pixels_become_bytes_and_back_within_half_a_step() -> None:
    images = np.random.default_rng(0).random((5, 3, 3))
    made = build(images, [0, 1, 0, 1, 0])
    assert made.images.shape == (5, 3, 3, 1)
    assert np.abs(made.read(np.arange(5))[..., 0] / 255 - images).max() <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.full((2, 2, 2), np.nan), [0, 1], "image 0 has NaN or infinite pixels"),
        (np.full((2, 2, 2), 3.0), [0, 1], "must lie in 0..1"),
        (np.zeros((0, 2, 2)), np.zeros(0, int), "no images"),
        (np.zeros((2, 2, 2), np.uint8), [0, 2], "label 2 is out of range 0..1"),
        (np.zeros((2, 2, 2), np.uint8), [-1, 0], "label -1 is out of range 0..1"),
        (np.zeros((2, 2, 2), np.uint8), [0.0, float("nan")], "must be whole numbers"),
        (np.zeros((2, 2, 2), np.uint8), [0], "1 labels for 2 images"),
        (np.zeros((2, 2, 2, 5), np.uint8), [0, 1], "must be [N, H, W, 1 or 3]"),
        (np.zeros((2, 2, 2), np.int16), [0, 1], "must be uint8"),
    ],
)
def test_bad_arrays_are_refused_in_one_line(images: np.ndarray, labels: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        build(images, labels)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fingerprint_follows_pixels_labels_and_class_names() -> None:
    images = np.zeros((2, 2, 2), np.uint8)
    other = images.copy()
    other[1, 1, 1] = 1
    prints = [
        build(images, [0, 1]).fingerprint,
        build(other, [0, 1]).fingerprint,
        build(images, [1, 0]).fingerprint,
        build(images, [0, 1], classes=3).fingerprint,
    ]
    assert len(set(prints)) == 4
    assert build(images.copy(), [0, 1]).fingerprint == prints[0]


def test_splits_need_equal_classes() -> None:
    with pytest.raises(DataError, match="both need the same ones"):
        Splits(image_set(classes=4), image_set(classes=5))


def test_a_source_is_read_only_when_asked() -> None:
    lazy, source = counting(image_set())
    assert lazy.lazy
    assert source.reads.sum() == 0
    lazy.read(np.array([3, 5]))
    assert source.reads.nonzero()[0].tolist() == [3, 5]


def test_stratified_parts_are_disjoint_and_keep_class_shares() -> None:
    labels = torch.arange(100) % 4
    train, test = stratified(labels, 0.25, seed=0)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(100))
    assert sorted(torch.bincount(labels[test]).tolist()) == [6, 6, 6, 7]
    assert torch.equal(stratified(labels, 0.25, seed=0)[1], test)
    assert not torch.equal(stratified(labels, 0.25, seed=1)[1], test)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_test_fraction_must_leave_two_parts(fraction: float) -> None:
    with pytest.raises(DataError, match="test_fraction"):
        stratified(torch.arange(10) % 2, fraction, seed=0)


def test_a_class_of_one_sample_cannot_be_split() -> None:
    with pytest.raises(DataError, match="cannot split"):
        stratified(torch.tensor([0, 0, 0, 1]), 0.5, seed=0)


def test_the_base_defines_no_data() -> None:
    with pytest.raises(TypeError, match="defines no load"):
        Dataset().load()
