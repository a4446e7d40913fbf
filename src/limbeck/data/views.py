"""Replayable augmentation: a view is a number, and (seed, sample, view) says all that is random in it.

So an epoch can be replayed, a frozen teacher's answer to a view can be kept, and a run that was killed
sees the same pixels again, whatever batch a sample stands in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data import chance
from limbeck.errors import ConfigError, ShapeError

# One number per purpose, so that switching one augmentation on leaves the draws of the others as they were.
_AREA, _RATIO, _LEFT, _TOP, _FLIP, _ANGLE, _RIGHTWARD, _DOWNWARD, _BLUR, _GAIN, _INVERT, _NOISE, _WARP = (
    range(13)
)

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma
_BLUR_REACH = 3  # pixels either side
_WARP_KNOTS = 4  # control points of a warp along each side


@dataclass(frozen=True, kw_only=True)
class Views:
    """How images are augmented. With all fields at their defaults a view is the image, resized.

    Pixels outside the image repeat its edge. Bilinear sampling in float32.
    Differs from torchvision's RandomResizedCrop: one resampling does crop, rotation, shift and flip
    together, and a crop that leaves the image is cut to it instead of drawn again.

    Attributes:
        count: views per sample, replayed in turn (epoch modulo ``count``); None = a fresh one each epoch.
        scale: range of the crop's share of the area; above 1 the image is shrunk into the frame.
        ratio: range of the crop's width over height.
        flip: probability of a left-right flip, 0..1.
        degrees: rotation drawn from -degrees..degrees.
        translate: shift in both directions drawn from +- this share of the side.
        warp: deviation, as a share of the side, of the smooth random displacement of 4 x 4 control points.
        blur: deviation in pixels of a Gaussian blur drawn from 0..blur.
        contrast: range of the factor on pixel values.
        invert: probability that bright and dark change places, 0..1.
        noise: deviation of the noise added to each pixel, on the scale 0..1.
    """

    count: int | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    warp: float = 0.0
    blur: float = 0.0
    contrast: tuple[float, float] = (1.0, 1.0)
    invert: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigError(f"views.count is {self.count} but must be at least 1, or null for fresh views")
        for field in ("scale", "ratio", "contrast"):
            low, high = getattr(self, field)
            if not 0 < low <= high:
                raise ConfigError(
                    f"views.{field} is [{low}, {high}] but must be [low, high] with 0 < low <= high"
                )
        for field in ("flip", "invert"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"views.{field} is {getattr(self, field)} but is a probability: 0..1")
        for field in ("degrees", "translate", "warp", "blur", "noise"):
            if not getattr(self, field) >= 0:
                raise ConfigError(f"views.{field} is {getattr(self, field)} but must be at least 0")

    @property
    def moves(self) -> bool:
        """Whether views differ in where pixels come from."""
        still = self.scale == self.ratio == (1.0, 1.0)
        return not still or self.flip > 0 or self.degrees > 0 or self.translate > 0 or self.warp > 0

    @property
    def plain(self) -> bool:
        """Whether every view is the image itself, resized."""
        quiet = self.blur == self.invert == self.noise == 0 and self.contrast == (1.0, 1.0)
        return not self.moves and quiet

    def number(self, epoch: int) -> int:
        """The view that samples show in ``epoch``: always 0 where nothing is random."""
        if self.plain:
            return 0
        return epoch if self.count is None else epoch % self.count

    def render(
        self, images: Tensor, index: Tensor, view: Tensor, *, seed: int, size: int, channels: int
    ) -> Tensor:
        """The views as the networks will see them, before normalisation.

        Args:
            images: uint8 [B, H, W, C].
            index: position [B] of each sample in its data set.
            view: number [B] of each sample's view.
            seed: the run's seed.
            size: height and width of the result in pixels.
            channels: 1 (grey, by luma) or 3 (a grey image is repeated), or C.

        Returns:
            float32 [B, channels, size, size] in [0, 1]. Where nothing is random and H = W = size, exactly
            ``images / 255``. A sample's pixels do not depend on the batch around it.

        Raises:
            ShapeError: ``channels`` cannot be made from C.
        """
        pixels = _channels(images.permute(0, 3, 1, 2).float() / 255, channels)
        keys = _Keys(seed, index.numpy(), view.numpy())
        pixels = self._move(pixels, keys, size) if self.moves else resize(pixels, size)
        if self.blur:
            pixels = _blur(pixels, keys.uniform(_BLUR) * self.blur)
        if self.contrast != (1.0, 1.0):
            pixels = pixels * _column(_between(keys.uniform(_GAIN), self.contrast))
        if self.noise:
            pixels = pixels + self.noise * keys.normal(_NOISE, pixels)
        if self.invert:
            swap = _column(keys.uniform(_INVERT)) < self.invert
            pixels = torch.where(swap, 1 - pixels, pixels)
        return pixels if self.plain else pixels.clamp_(0, 1)

    def _move(self, pixels: Tensor, keys: _Keys, size: int) -> Tensor:
        """Crop, rotation, shift and flip in one resampling."""
        if min(pixels.shape[2:]) > 2 * size:  # a bilinear sample sees 2 x 2 pixels only: reduce first
            pixels = resize(pixels, 2 * size)
        area = _between(keys.uniform(_AREA), self.scale)
        ratio = np.exp(_between(keys.uniform(_RATIO), (math.log(self.ratio[0]), math.log(self.ratio[1]))))
        wide, high = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if self.scale[1] <= 1:
            wide, high = np.minimum(wide, 1), np.minimum(high, 1)
        # Coordinates run over -1..1. The frame's centre moves as far as the frame stays in the image (or,
        # for a shrunk image, as far as the image stays in the frame), and then by the shift.
        shift = 2 * self.translate
        across = (1 - wide) * _sign(keys.uniform(_LEFT)) + shift * _sign(keys.uniform(_RIGHTWARD))
        down = (1 - high) * _sign(keys.uniform(_TOP)) + shift * _sign(keys.uniform(_DOWNWARD))
        angle = np.deg2rad(self.degrees * _sign(keys.uniform(_ANGLE)))
        mirror = np.where(keys.uniform(_FLIP) < self.flip, -1, 1)
        cos, sin = np.cos(angle), np.sin(angle)
        rows = [cos * wide * mirror, -sin * high, across, sin * wide * mirror, cos * high, down]
        a, b, c, d, e, f = (_column(row)[..., 0] for row in rows)
        steps = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
        x, y = steps[None, None, :], steps[None, :, None]
        grid = torch.stack((a * x + b * y + c, d * x + e * y + f), dim=-1)
        if self.warp:
            knots = keys.normal(_WARP, torch.empty(len(pixels), 2, _WARP_KNOTS, _WARP_KNOTS))
            bend = F.interpolate(knots, (size, size), mode="bicubic", align_corners=True)
            grid = grid + 2 * self.warp * bend.permute(0, 2, 3, 1)
        return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class _Keys:
    """What the draws of one batch depend on."""

    seed: int
    index: npt.NDArray[np.int64]
    view: npt.NDArray[np.int64]

    def uniform(self, purpose: int) -> npt.NDArray[np.float32]:
        """[B] in [0, 1)."""
        return chance.uniform(self.seed, purpose, self.index, self.view)

    def normal(self, purpose: int, like: Tensor) -> Tensor:
        """Of the shape of ``like`` [B, ...], deviation 1."""
        sample = chance.bits(self.seed, purpose, self.index, self.view).astype(np.int64)
        return torch.from_numpy(chance.normal(sample[:, None], np.arange(like[0].numel()))).view_as(like)


def resize(pixels: Tensor, size: int) -> Tensor:
    """``pixels`` [B, C, H, W] brought to [B, C, size, size]: bilinear, antialiased where it shrinks."""
    if tuple(pixels.shape[2:]) == (size, size):
        return pixels
    shrinks = max(pixels.shape[2:]) > size
    return F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)


def _channels(pixels: Tensor, channels: int) -> Tensor:
    have = pixels.shape[1]
    if have == channels:
        return pixels
    if have == 1:
        return pixels.expand(-1, channels, -1, -1)
    if have == 3 and channels == 1:
        red, green, blue = (weight * pixels[:, i : i + 1] for i, weight in enumerate(_GREY))
        return red + green + blue
    raise ShapeError(f"channels is {channels} but the images have {have}: choose {have} or 1")


def _blur(pixels: Tensor, deviation: npt.NDArray[np.float32]) -> Tensor:
    """Gaussian blur with a deviation [B] per sample, as sums of shifted images (no batch-wide kernel)."""
    offsets = np.arange(-_BLUR_REACH, _BLUR_REACH + 1)
    weights = np.exp(-0.5 * (offsets / np.maximum(deviation, 1e-3)[:, None]) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    for dim in (2, 3):
        side = pixels.shape[dim]
        pad = (0, 0, _BLUR_REACH, _BLUR_REACH) if dim == 2 else (_BLUR_REACH, _BLUR_REACH, 0, 0)
        padded = F.pad(pixels, pad, mode="replicate")
        pixels = torch.zeros_like(pixels)
        for place in range(len(offsets)):
            pixels += _column(weights[:, place]) * padded.narrow(dim, place, side)
    return pixels


def _between(draw: npt.NDArray[np.float32], span: tuple[float, float]) -> npt.NDArray[np.float32]:
    return (span[0] + draw * (span[1] - span[0])).astype(np.float32)


def _sign(draw: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """0..1 spread over -1..1."""
    return 2 * draw - 1


def _column(values: npt.NDArray[np.floating]) -> Tensor:
    """[B] as float32 [B, 1, 1, 1]."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).reshape(-1, 1, 1, 1)
