"""How hard samples are to learn, and which ones data pruning keeps by that."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import ConfigError, DataError, NonFiniteError, unknown

Mode = Literal["hard", "easy", "moderate", "random"]


def el2n(probs: Tensor, labels: Tensor) -> Tensor:
    """The error's norm: the mean over S of ‖p - onehot(y)‖₂.

    Args:
        probs: class probabilities [S, N, C] at S checkpoints or seeds of an early training.
        labels: class ids [N].

    Returns:
        [N] in [0, √2]: 0 where the prediction is perfect, √2 where it is certain and wrong.

    Source: Paul et al., NeurIPS 2021 (arXiv 2107.07075).
    """
    return torch.mean(_error(probs, labels), 0)


def grand_last_layer(probs: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """The norm of the gradient of the last layer's weights: the mean over S of ‖p - onehot(y)‖₂ · ‖h‖₂.

    Args:
        probs: class probabilities [S, N, C].
        features: h, what the last linear layer reads, [S, N, D].
        labels: class ids [N].

    Returns:
        [N] >= 0.

    Source: GraNd, Paul et al., NeurIPS 2021 (arXiv 2107.07075).
    Differs: the gradient of the last layer alone, not of all parameters.
    """
    return torch.mean(_error(probs, labels) * torch.linalg.vector_norm(features, dim=-1), 0)


def forgetting(correct: Tensor) -> Tensor:
    """How often a sample that was right in one epoch is wrong in the next.

    Args:
        correct: [E, N], nonzero where the sample was right at the end of that epoch.

    Returns:
        [N] in 0 .. E; a sample that was never right counts E.

    Source: Toneva et al., ICLR 2019 (arXiv 1812.05159); the value of never-learnt samples as in data pruning.
    """
    right = correct.bool()
    lost = (right[:-1] & ~right[1:]).sum(0)
    return torch.where(right.any(0), lost, len(correct)).to(torch.float64)


def keep_indices(
    scores: Tensor,
    fraction: float,
    mode: Mode,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The floor(fraction · N + 0.5) samples that are kept.

    ``hard`` keeps the largest scores, ``easy`` the smallest, ``moderate`` those nearest to the median,
    ``random`` any, whatever they score. Of equal ones the first stays.

    Args:
        scores: [N], higher = harder.
        fraction: share to keep, in (0, 1].
        mode: which ones.
        labels: class ids [N] to keep that share of each class; None = of all samples together.
        generator: draws the random ones.

    Returns:
        Sorted positions [n].

    Raises:
        NonFiniteError: a score is NaN or infinite.
        DataError: nothing would be kept.
        ConfigError: a wrong fraction or mode, or ``random`` without a generator.

    Source: Ben-Baruch et al., ICML 2025 (arXiv 2403.07854); ``moderate``: Xia et al., ICLR 2023, by the score
    in place of the distance to the class centre.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction}: allowed are shares above 0, up to 1")
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode))
    bad = (~torch.isfinite(scores)).nonzero().flatten()
    if len(bad):
        raise NonFiniteError(
            f"the score of sample {int(bad[0])} is not finite: mend the network that gave it"
        )
    groups = [torch.arange(len(scores))] if labels is None else _classes(labels)
    kept = torch.cat([group[_kept(scores[group], fraction, mode, generator)] for group in groups])
    if not len(kept):
        raise DataError(f"a fraction of {fraction} keeps none of {len(scores)} samples: raise it")
    return kept.sort().values


def _error(probs: Tensor, labels: Tensor) -> Tensor:
    error: Tensor = torch.linalg.vector_norm(probs - F.one_hot(labels, probs.shape[-1]), dim=-1)
    return error


def _classes(labels: Tensor) -> list[Tensor]:
    return [(labels == k).nonzero().flatten() for k in sorted(set(labels.tolist()))]


def _kept(scores: Tensor, fraction: float, mode: Mode, generator: torch.Generator | None) -> Tensor:
    """Positions of what is kept of one group."""
    count = math.floor(fraction * len(scores) + 0.5)
    if mode == "random":
        if generator is None:
            raise ConfigError("mode 'random' needs a generator to draw from: give one")
        return torch.randperm(len(scores), generator=generator)[:count]
    if mode == "moderate":
        scores = (scores - scores.double().quantile(0.5)).abs()
    return scores.argsort(descending=mode == "hard", stable=True)[:count]
