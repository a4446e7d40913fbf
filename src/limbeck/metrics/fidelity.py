"""How close a student is to its teacher, whatever the labels say."""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor

from limbeck.errors import DataError, ShapeError
from limbeck.losses import kl_divergence, pearson

# In place of an answer that could not be read from what a model wrote.
UNPARSABLE = -1


def agreement(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> float:
    """Share of samples, or of tokens, for which both predict one class, percent.

    Args:
        student: logits [N, C] or [B, T, V].
        teacher: logits of the same shape.
        mask: True = counts, [N] or [B, T]; None = all.

    Raises:
        ShapeError: the shapes do not fit one another.
        DataError: nothing counts.

    Source: Stanton et al., NeurIPS 2021 (arXiv 2106.05945), eq. 2: top-1 agreement.
    """
    _check(student, teacher, mask)
    same = student.argmax(-1) == teacher.argmax(-1)
    return 100 * float((same if mask is None else same[mask.bool()]).double().mean())


def answer_agreement(student: Tensor, teacher: Tensor) -> float:
    """Share of items that both answer alike, percent; an unparsable answer agrees with none.

    Two accurate models agree by being right: show ``agreement_table`` beside it.

    Args:
        student: answers [N] as int64 ids; ``UNPARSABLE`` where there is none.
        teacher: the same of the teacher.

    Raises:
        ShapeError: the two differ in number.
        DataError: there are no items.

    Source: Ramesh et al., Findings of ACL 2025 (arXiv 2505.15442).
    """
    _check(student, teacher)
    return 100 * float(((student == teacher) & (student != UNPARSABLE)).double().mean())


def agreement_table(student: Tensor, teacher: Tensor, gold: Tensor) -> Tensor:
    """Shares of items by who is right, percent: rows student right / wrong, columns teacher right / wrong.

    The first row sums to the student's accuracy, the first column to the teacher's.

    Args:
        student: answers [N]; ``UNPARSABLE`` is never right.
        teacher: the same of the teacher.
        gold: the right answers [N].

    Returns:
        [2, 2], float64; sums to 100.

    Raises:
        ShapeError: the three differ in number.
        DataError: there are no items.

    Source: Ramesh et al., Findings of ACL 2025 (arXiv 2505.15442).
    """
    _check(student, teacher)
    _check(student, gold)
    own, other = ((x != gold) | (x == UNPARSABLE) for x in (student, teacher))
    counts = torch.bincount(2 * own.long() + other.long(), minlength=4)
    return 100 * counts.double().reshape(2, 2) / len(gold)


def top_overlap(student: Tensor, teacher: Tensor, k: int = 5, mask: Tensor | None = None) -> float:
    """Share of the teacher's ``k`` most probable classes that are among the student's ``k``, percent.

    Where there are fewer classes, all but one count: all of them would always overlap.

    Args:
        student: logits [N, C] or [B, T, V]; C of at least 2.
        teacher: logits of the same shape.
        k: >= 1.
        mask: True = counts, [N] or [B, T]; None = all.

    Raises:
        ShapeError: the shapes do not fit one another.
        DataError: nothing counts.
    """
    _check(student, teacher, mask)
    shares = top_shares(student, teacher, k)
    return 100 * float((shares if mask is None else shares[mask.bool()]).double().mean())


def top_shares(student: Tensor, teacher: Tensor, k: int = 5) -> Tensor:
    """What ``top_overlap`` is the mean of: the share [...] in 0 .. 1 at each place, from logits [..., C]."""
    k = max(min(k, student.shape[-1] - 1), 1)
    own, other = (x.topk(k, -1).indices for x in (student, teacher))
    return (own[..., None] == other[..., None, :]).any(-1).float().mean(-1)


def predictive_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> float:
    """Mean KL(teacher ‖ student) of the class distributions at temperature 1, in nats.

    Arguments and errors as ``agreement``.

    Source: Stanton et al., NeurIPS 2021 (arXiv 2106.05945), eq. 3: predictive KL.
    """
    _check(student, teacher, mask)
    return float(kl_divergence(student.double(), teacher.double(), mask=mask))


def rank_correlation(student: Tensor, teacher: Tensor) -> float:
    """Mean over samples of Spearman's correlation between the orders of the classes, in -1 .. 1.

    Equal logits share the mean of their ranks. A sample for which either network makes no difference between
    the classes counts 0, and so does every sample where there is one class; with two it counts 1 or -1.

    Arguments and errors as ``agreement``.

    Source: Bassam, Zhu, Bian, NeurIPS 2025 (arXiv 2506.12542) for the use; Spearman 1904 for the measure.
    """
    _check(student, teacher)
    ranks = [torch.as_tensor(rankdata(x.double().cpu(), axis=-1)) for x in (student, teacher)]
    return float(pearson(*ranks).mean())


def linear_cka(student: Tensor, teacher: Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same samples, in 0 .. 1.

    Unchanged by rotation and by scaling of either; the widths may differ. A representation that is the same
    for all samples gives 0.

    Args:
        student: features [N, D1].
        teacher: features [N, D2].

    Raises:
        ShapeError: not two matrices over the same number of samples.
        DataError: there are no samples.

    Source: Kornblith et al., ICML 2019 (arXiv 1905.00414), eq. 4 and section 3.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ShapeError(
            f"features are {list(student.shape)} and {list(teacher.shape)}: "
            "give [N, D] for the same N samples"
        )
    if not len(student):
        raise DataError("similarity over 0 samples: give at least one")
    x = student.double() - student.double().mean(0)
    y = teacher.double() - teacher.double().mean(0)
    own, other = (x.T @ x).norm(), (y.T @ y).norm()
    scale = float(own * other)
    return float((y.T @ x).square().sum()) / scale if scale > 0 else 0.0


def _check(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> None:
    if student.shape != teacher.shape:
        raise ShapeError(
            f"one side is {list(student.shape)} but the other {list(teacher.shape)}: "
            "compare over the same samples and classes"
        )
    if mask is not None and mask.shape != student.shape[:-1]:
        raise ShapeError(
            f"mask is {list(mask.shape)} for logits {list(student.shape)}: give one value per token"
        )
    if not len(student) or (mask is not None and not bool(mask.any())):
        raise DataError("fidelity over 0 samples: give at least one")
