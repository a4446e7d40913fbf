"""What several objectives share: checks of fields and features, warm-up."""

from __future__ import annotations

import math

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


def warm_up(at: Progress, epochs: int) -> float:
    """Linear growth over the first ``epochs`` epochs, the first of which counts as 1; 0 epochs = none."""
    return min((at.epoch + 1) / epochs, 1.0) if epochs else 1.0
