"""Feature maps of two networks brought to one size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import ShapeError


def at_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width of the two, by adaptive average pooling.

    Args:
        student: [B, C_s, H, W].
        teacher: [B, C_t, H', W'].

    Returns:
        The maps [B, C_s, h, w] and [B, C_t, h, w]; one that has that size already is given back as it is.

    Raises:
        ShapeError: one is no map, or they are of different samples.
    """
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise ShapeError(
            f"the student's feature is {list(student.shape)} but the teacher's is {list(teacher.shape)}: "
            "give maps [B, C, H, W] of the same samples"
        )
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    own, other = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
    return own, other
