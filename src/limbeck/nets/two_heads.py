"""Two heads as one answer, and the heads and teachers that a vision-language model starts.

B batch, C classes, D feature width, K cached samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CE_WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))
TEMPERATURES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
CLIP_SCALE = 100.0  # what CLIP multiplies cosines by


def mixed_log_probs(
    logits: Tensor, soft_logits: Tensor, ce_weight: float | Tensor, temperature: float | Tensor
) -> Tensor:
    """log of w · softmax(logits) + (1 - w) · softmax(soft_logits / T), [B, C].

    Args:
        logits: of the head that learnt the labels, [B, C].
        soft_logits: of the head that learnt from the teacher, [B, C].
        ce_weight: w in [0, 1].
        temperature: T > 0, of the second head alone.

    Source: DHO (arXiv 2505.07675), official code: probabilities are mixed, not logits.
    """
    weight = torch.as_tensor(ce_weight, dtype=logits.dtype, device=logits.device)
    both = torch.stack([F.log_softmax(logits, dim=-1), F.log_softmax(soft_logits / temperature, dim=-1)])
    shares = torch.stack([weight, 1 - weight]).log()
    return (both + shares.reshape(2, *(1,) * logits.ndim)).logsumexp(0)


def search_mix(logits: Tensor, soft_logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """The best mixture of two heads on samples that neither was trained on.

    The grid is gone over temperature by temperature, the weights within; the first of equals is kept.

    Args:
        logits: of the head that learnt the labels, [N, C].
        soft_logits: of the head that learnt from the teacher, [N, C].
        labels: class ids [N] int64.

    Returns:
        (accuracy in percent, weight of the first head, temperature of the second).

    Source: DHO (arXiv 2505.07675), official code, train_others.py.
    """
    best = (0, 0.0, 1.0)
    for temperature in TEMPERATURES:
        for weight in CE_WEIGHTS:
            answers = mixed_log_probs(logits, soft_logits, weight, temperature).argmax(-1)
            hits = int((answers == labels).sum())
            if hits > best[0]:
                best = (hits, weight, temperature)
    return 100 * best[0] / len(labels), best[1], best[2]


def text_head(text_weights: Tensor) -> nn.Linear:
    """A linear head that starts with text embeddings [D, C] as its weight and without bias.

    DHO takes the means of the prompts' embeddings as they are, not normalised.
    """
    width, classes = text_weights.shape
    head = nn.Linear(width, classes, device=text_weights.device, dtype=text_weights.dtype)
    with torch.no_grad():
        head.weight.copy_(text_weights.mT)
        head.bias.zero_()
    return head


def cosine_logits(features: Tensor, head: nn.Module, scale: float = CLIP_SCALE) -> Tensor:
    """scale · head(features of length 1), [B, C]: the factor multiplies the head's bias too.

    Source: DHO (arXiv 2505.07675), official code, train_imgnet_semi.py.
    """
    logits: Tensor = scale * head(F.normalize(features, dim=-1))
    return logits


def tip_adapter_logits(
    features: Tensor,
    text_weights: Tensor,
    keys: Tensor,
    values: Tensor,
    alpha: float,
    beta: float,
    scale: float = CLIP_SCALE,
) -> Tensor:
    """What a few-shot CLIP teacher says: scale · f W + alpha · exp(-beta (1 - f Aᵀ)) V, [B, C].

    Args:
        features: image embeddings f of length 1, [B, D].
        text_weights: W, text embeddings of length 1, [D, C].
        keys: A, cached image embeddings, [K, D].
        values: V, their labels, one-hot [K, C].
        alpha: weight of the cache.
        beta: how fast a cached sample's say falls with its distance.

    Source: Tip-Adapter as in DHO's official code, train_others.py.
    """
    return scale * features @ text_weights + alpha * torch.exp(beta * (features @ keys.mT - 1)) @ values
