"""Made-up outputs of language models: what an objective over tokens reads."""

from __future__ import annotations

import torch

from limbeck.contracts import Batch, Outputs, Unembedding

TEXTS, LENGTH, VOCABULARY = 3, 5, 11
ROWS = torch.tensor([0, 1, 2, 6, 7, 11, 12, 13, 14])  # the places that count, of all 15
MARKS = torch.tensor([0.0, 0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.0])


def batch() -> Batch:
    """Three texts of five tokens, of which nine count."""
    draws = torch.Generator().manual_seed(0)
    index = torch.arange(TEXTS)
    return Batch(
        inputs=torch.randint(VOCABULARY, (TEXTS, LENGTH), generator=draws),
        labels=torch.randint(VOCABULARY, (len(ROWS),), generator=draws),
        index=index,
        view=0 * index,
        rows=ROWS,
        marks={"privacy": MARKS},
    )


def said(
    seed: int, width: int, *, rows: int = len(ROWS), vocabulary: int = VOCABULARY, grad: bool = False
) -> Outputs:
    """A language model's answer to ``rows`` tokens, with all its logits, in float64."""
    draws = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=draws, dtype=torch.float64).requires_grad_(grad)
    head = Unembedding(torch.randn(vocabulary, width, generator=draws, dtype=torch.float64))
    return Outputs(logits=head.logits(hidden), hidden=hidden, unembedding=head)
