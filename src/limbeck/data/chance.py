"""Chance as a pure function of keys: what makes an augmented view and a sample order replayable.

A draw depends on its keys alone (seed, sample, view, purpose), never on what was drawn before, so any
batch can be made again on its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: Bits) -> Bits:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014, figure 17): a bijection of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(*keys: Any) -> Bits:
    """64 random bits for every combination of ``keys``.

    Args:
        keys: integers or integer arrays that broadcast together; their order matters.

    Returns:
        uint64 of the broadcast shape.
    """
    state = np.zeros((1,), np.uint64)
    for key in keys:
        word = np.atleast_1d(np.asarray(key, dtype=np.int64)).astype(np.uint64)
        state = _mix((state ^ word) + _GOLDEN)
    return state


def uniform(*keys: Any) -> npt.NDArray[np.float32]:
    """A number in [0, 1) for every combination of ``keys``: float32 with 24 random bits."""
    return ((bits(*keys) >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


def normal(*keys: Any) -> npt.NDArray[np.float32]:
    """A nearly normal number (mean 0, deviation 1, at most 3.5) for every combination of ``keys``.

    The sum of four 16-bit uniform parts of one 64-bit draw (Irwin-Hall), centred and scaled: cheap enough
    for one draw per pixel.
    """
    word = bits(*keys)
    parts = [(word >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    total = (parts[0] + parts[1] + parts[2] + parts[3]).astype(np.float32) * np.float32(2.0**-16)
    centred: npt.NDArray[np.float32] = (total - np.float32(2.0)) * np.float32(3.0**0.5)
    return centred


def order(count: int, *keys: int) -> npt.NDArray[np.int64]:
    """A permutation of ``count`` positions that depends on ``keys`` alone: int64 [count]."""
    return np.argsort(bits(*keys, np.arange(count)), kind="stable").astype(np.int64)
