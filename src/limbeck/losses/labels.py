"""Cross entropy against labels, over all classes or over a window of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import DataError, ShapeError
from limbeck.losses.reduction import Reduction, full_precision, reduce


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """(1 - e) · (-log p_label) + e/C · Σ_k (-log p_k), in nats, with e the smoothing.

    Args:
        logits: [..., C].
        labels: class ids [...] int64 in 0 .. C - 1; not checked here (that would stop the device).
        smoothing: e in [0, 1); 0 is plain cross entropy.
        mask: True = counts, shape [...] or its leading axes.
        weights: >= 0, shape [...] or its leading axes.
        reduction: see ``reduce``.

    Returns:
        >= 0: a scalar, or [...] with ``reduction="none"``.

    Source: label smoothing: Szegedy et al., CVPR 2016 (arXiv 1512.00567), section 7.
    """
    classes_second = full_precision(logits).movedim(-1, 1) if logits.ndim > 2 else full_precision(logits)
    if mask is None and weights is None and reduction == "mean":  # the same in one step
        return F.cross_entropy(classes_second, labels, label_smoothing=smoothing)
    items = F.cross_entropy(classes_second, labels, reduction="none", label_smoothing=smoothing)
    return reduce(items, mask=mask, weights=weights, reduction=reduction)


def masked_cross_entropy(logits: Tensor, labels: Tensor, start: int, stop: int) -> Tensor:
    """Cross entropy over the classes ``start`` .. ``stop - 1``; every other column counts as minus infinity.

    Equal to plain cross entropy on the columns of the window, which is how a training step does it: this
    function reads the labels to check them, and so stops the device.

    Args:
        logits: [B, C].
        labels: class ids [B] int64 in ``start`` .. ``stop - 1``.
        start: first class of the current task.
        stop: one past its last class.

    Returns:
        The mean over the batch, >= 0. Columns outside the window get exactly zero gradient.

    Raises:
        ShapeError: the window is empty or leaves the C columns.
        DataError: a label lies outside the window (its cross entropy would be infinite).

    Source: Smith et al., CVPR 2023 (arXiv 2211.13218), official code, learners/prompt.py.
    """
    if not 0 <= start < stop <= logits.shape[-1]:
        raise ShapeError(
            f"the class window {start}..{stop} does not lie in 0..{logits.shape[-1]}: "
            "give 0 <= start < stop <= number of columns"
        )
    outside = labels[(labels < start) | (labels >= stop)]
    if outside.numel():
        raise DataError(
            f"label {int(outside[0])} lies outside the current task's classes {start}..{stop - 1}: "
            "give only samples of the current task"
        )
    return cross_entropy(logits[:, start:stop], labels - start)
