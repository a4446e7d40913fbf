"""How close a student is to its teacher, whatever the labels say."""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor

from limbeck.errors import DataError, ShapeError
from limbeck.losses import kl_divergence, pearson


def agreement(student: Tensor, teacher: Tensor) -> float:
    """Share of samples on which both predict one class, percent.

    Args:
        student: logits [N, C].
        teacher: logits [N, C].

    Raises:
        ShapeError: the two differ in shape.
        DataError: there are no samples.

    Source: Stanton et al., NeurIPS 2021 (arXiv 2106.05945), eq. 2: top-1 agreement.
    """
    _check(student, teacher)
    return 100 * float((student.argmax(-1) == teacher.argmax(-1)).double().mean())


def predictive_kl(student: Tensor, teacher: Tensor) -> float:
    """Mean KL(teacher ‖ student) of the class distributions at temperature 1, in nats.

    Arguments and errors as ``agreement``.

    Source: Stanton et al., NeurIPS 2021 (arXiv 2106.05945), eq. 3: predictive KL.
    """
    _check(student, teacher)
    return float(kl_divergence(student.double(), teacher.double()))


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


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ShapeError(
            f"student logits are {list(student.shape)} but the teacher's are {list(teacher.shape)}: "
            "compare over the same samples and classes"
        )
    if not len(student):
        raise DataError("fidelity over 0 samples: give at least one")
