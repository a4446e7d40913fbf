"""What several objectives share: checks of fields and features, forms of features, warm-up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from limbeck import losses
from limbeck.contracts import Outputs, Progress
from limbeck.errors import ConfigError, ShapeError, nearest


def at_least(field: str, value: float, low: float) -> None:
    """Raise ``ConfigError`` unless ``low <= value < infinity``."""
    if not low <= value < math.inf:
        raise ConfigError(f"{field} is {value} but must be a finite number of at least {low}")


def above(field: str, value: float, low: float) -> None:
    """Raise ``ConfigError`` unless ``low < value < infinity``."""
    if not low < value < math.inf:
        raise ConfigError(f"{field} is {value} but must be a finite number above {low}")


def same_classes(student: Outputs, teacher: Outputs) -> None:
    """Raise ``ShapeError`` unless both give logits over the same number of classes."""
    own, other = student.soft.shape[-1], teacher.logits.shape[-1]
    if own != other:
        raise ShapeError(
            f"the student has {own} classes but the teacher has {other}: "
            "give both heads the same classes in the same order"
        )


def matched(student: Outputs, teacher: Outputs, standardise: bool) -> tuple[Tensor, Tensor]:
    """The logits that are matched, standardised in both or as they are: (student's, teacher's) [..., C]."""
    own, other = student.soft, teacher.logits
    return (losses.standardise(own), losses.standardise(other)) if standardise else (own, other)


def feature(who: str, outputs: Outputs, tap: str) -> Tensor:
    """The feature tapped at ``tap``; a vector [B, D] counts as a map [B, D, 1, 1].

    Raises:
        ShapeError: the network gave no such feature.
    """
    if tap not in outputs.features:
        near = nearest(tap, outputs.features)
        hint = f"did you mean {near!r}? " if near else ""
        raise ShapeError(
            f"the {who} gives no feature at tap {tap!r}: {hint}"
            f"it gives {', '.join(outputs.features) or 'none'}"
        )
    found = outputs.features[tap]
    return found[:, :, None, None] if found.ndim == 2 else found


def as_map(found: Tensor) -> Tensor:
    """A feature as a map [B, C, H, W]: tokens [B, T, D] become a square, without a class token before them.

    Raises:
        ShapeError: neither all tokens nor all but the first make a square, or it has other axes.
    """
    if found.ndim == 4:
        return found
    if found.ndim != 3:
        raise ShapeError(f"a feature is {list(found.shape)}: tap maps [B, C, H, W] or tokens [B, T, D]")
    patches = found[:, _class_tokens(found.shape[1]) :]
    side = math.isqrt(patches.shape[1])
    return patches.mT.reshape(len(found), -1, side, side)


def as_vector(found: Tensor) -> Tensor:
    """A feature as vectors [B, D]: the mean of a map; of tokens the class token, or without one the mean."""
    if found.ndim == 4:
        return found.mean((2, 3))
    return found[:, 0] if _class_tokens(found.shape[1]) else found.mean(1)


def _class_tokens(tokens: int) -> int:
    """How many of so many tokens stand before the square of patches: 0 or 1."""
    for before in (0, 1):
        if tokens > before and math.isqrt(tokens - before) ** 2 == tokens - before:
            return before
    raise ShapeError(
        f"{tokens} tokens are no square of patches, with or without a class token: tap a network without "
        "extra tokens (registers, KD token, prepended prompts) and with a square grid"
    )


def map_pairs(
    student: Outputs, teacher: Outputs, own: Sequence[str], other: Sequence[str]
) -> list[tuple[Tensor, Tensor]]:
    """The maps [B, C, H, W] at the taps of both networks, stage by stage."""
    return [
        (as_map(feature("student", student, a)), as_map(feature("teacher", teacher, b)))
        for a, b in zip(own, other, strict=True)
    ]


def as_many(own: Sequence[str], other: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless both networks have as many taps, and one at least."""
    if len(own) != len(other) or not own:
        raise ConfigError(
            f"student_taps names {len(own)} layers but teacher_taps names {len(other)}: "
            f"name {'as many' if own or other else 'one or more'} in both"
        )


def warm_up(at: Progress, epochs: int) -> float:
    """Linear growth over the first ``epochs`` epochs, the first of which counts as 1; 0 epochs = none."""
    return min((at.epoch + 1) / epochs, 1.0) if epochs else 1.0
