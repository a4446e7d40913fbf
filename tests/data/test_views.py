from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.data.views import Views
from limbeck.errors import ConfigError, ShapeError

EVERYTHING = Views(
    scale=(0.5, 1.4),
    ratio=(0.7, 1.4),
    flip=0.5,
    degrees=20,
    translate=0.1,
    warp=0.03,
    blur=1.0,
    contrast=(0.5, 1.2),
    invert=0.3,
    noise=0.1,
)


def pixels(count: int = 6, side: int = 9, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, channels), dtype=torch.uint8, generator=generator)


def show(views: Views, images: Tensor, view: int = 0, **changes: Any) -> Tensor:
    index = changes.pop("index", torch.arange(len(images)))
    how: dict[str, Any] = {"seed": 0, "size": images.shape[1], "channels": images.shape[3], **changes}
    return views.render(images, index, torch.full_like(index, view), **how)


def test_without_augmentation_and_resizing_pixels_pass_through_exactly() -> None:
    images = pixels(channels=3)
    assert torch.equal(show(Views(), images), images.permute(0, 3, 1, 2).float() / 255)
    assert Views().plain
    assert [Views().number(epoch) for epoch in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("size", [5, 18])
def test_without_augmentation_images_are_resized_as_torch_does(size: int) -> None:
    images = pixels()
    want = F.interpolate(
        images.permute(0, 3, 1, 2).float() / 255, (size, size), mode="bilinear", antialias=size < 9
    )
    assert torch.equal(show(Views(), images, size=size), want)


def test_a_geometric_view_that_moves_nothing_is_the_image() -> None:
    images = pixels()
    still = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), degrees=1e-9)
    assert torch.allclose(show(still, images), images.permute(0, 3, 1, 2).float() / 255, atol=1e-5)


def test_a_certain_flip_mirrors() -> None:
    images = pixels()
    want = images.permute(0, 3, 1, 2).flip(3).float() / 255
    assert torch.allclose(show(Views(flip=1.0), images), want, atol=1e-5)


def test_half_of_the_samples_flip() -> None:
    images = pixels(1).expand(2000, 9, 9, 1)
    straight = images[0, :, :, 0].float() / 255
    shown = show(Views(flip=0.5), images)[:, 0]
    share = ((shown - straight).abs().amax(dim=(1, 2)) < 1e-4).float().mean()
    assert 0.45 < share < 0.55


def test_a_crop_shows_a_part_and_a_shrunk_image_keeps_all() -> None:
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).view(1, 1, 32, 1).expand(500, 32, 32, 1)
    crop = show(Views(scale=(0.25, 0.25)), ramp)
    extent = crop.amax(dim=(1, 2, 3)) - crop.amin(dim=(1, 2, 3))
    assert torch.allclose(extent, torch.full_like(extent, 15.5 * 8 / 255), atol=0.03)  # half of the ramp
    dot = torch.zeros(500, 33, 33, 1, dtype=torch.uint8)
    dot[:, 14:19, 14:19] = 255
    ink = show(Views(scale=(4.0, 4.0)), dot).sum(dim=(1, 2, 3))
    assert ink.min() > 4
    assert abs(ink.mean() - 25 / 4) < 0.1


def test_contrast_invert_noise_and_blur() -> None:
    images = pixels(200)
    plain = show(Views(), images)
    assert torch.allclose(show(Views(contrast=(0.5, 0.5)), images), plain / 2)
    assert torch.allclose(show(Views(invert=1.0), images), 1 - plain)
    noisy = show(Views(noise=0.01), images) - plain
    inside = (plain > 0.1) & (plain < 0.9)
    assert 0.009 < noisy[inside].std() < 0.011
    assert show(Views(blur=2.0), images).var() < plain.var()
    flat = torch.full((3, 9, 9, 1), 100, dtype=torch.uint8)
    assert torch.allclose(show(Views(blur=2.0), flat), torch.tensor(100 / 255), atol=1e-6)


def test_a_warp_bends_smoothly_and_keeps_the_mean() -> None:
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).view(1, 1, 32, 1).expand(200, 32, 32, 1)
    moved = show(Views(warp=0.02), ramp) - show(Views(), ramp)
    assert 0.005 < moved.std() < 0.04
    assert moved.mean().abs() < 0.005


@given(
    part=st.lists(st.integers(0, 11), min_size=1, max_size=12),
    view=st.integers(0, 10**6),
    seed=st.integers(-(2**40), 2**40),
)
def test_a_view_does_not_depend_on_the_batch_around_it(part: list[int], view: int, seed: int) -> None:
    images, places = pixels(12, channels=3), torch.tensor(part)
    together = show(EVERYTHING, images, view, seed=seed)
    alone = show(EVERYTHING, images[places], view, seed=seed, index=places)
    assert torch.equal(alone, together[places])


def test_seed_sample_and_view_each_change_the_picture() -> None:
    image = pixels(1)
    seen = [
        show(EVERYTHING, image, view, seed=seed, index=torch.tensor([index]))
        for seed in range(2)
        for index in range(2)
        for view in range(2)
    ]
    for place, one in enumerate(seen):
        assert all(not torch.equal(one, other) for other in seen[:place])


@pytest.mark.parametrize("size", [4, 9, 20])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_view_is_finite_and_in_range(size: int, channels: int) -> None:
    shown = show(EVERYTHING, pixels(50, channels=3), 3, size=size, channels=channels)
    assert shown.shape == (50, channels, size, size)
    assert shown.dtype == torch.float32
    assert shown.min() >= 0
    assert shown.max() <= 1


def test_grey_and_colour() -> None:
    grey = pixels()
    assert torch.equal(
        show(Views(), grey, channels=3), (grey.permute(0, 3, 1, 2).float() / 255).expand(-1, 3, -1, -1)
    )
    red = torch.zeros(1, 9, 9, 3, dtype=torch.uint8)
    red[..., 0] = 255
    assert torch.allclose(show(Views(), red, channels=1), torch.tensor(0.299))
    with pytest.raises(ShapeError, match="channels is 2 but the images have 3"):
        show(Views(), red, channels=2)


def test_views_are_replayed_or_fresh() -> None:
    assert [Views(count=3, flip=0.5).number(epoch) for epoch in range(5)] == [0, 1, 2, 0, 1]
    assert [Views(flip=0.5).number(epoch) for epoch in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 0),
        ("scale", (0.0, 1.0)),
        ("scale", (1.0, 0.5)),
        ("ratio", (-1.0, 1.0)),
        ("contrast", (2.0, 1.0)),
        ("flip", 1.5),
        ("invert", -0.1),
        ("degrees", -1.0),
        ("noise", float("nan")),
    ],
)
def test_wrong_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"views\.{field} is"):
        Views(**{field: value})  # type: ignore[arg-type]
