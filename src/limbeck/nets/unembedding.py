"""The last layer of a language model: from hidden states to a logit for each token of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Unembedding:
    """logits = cap · tanh(scale · (W h + b) / cap), or without the tanh where there is no cap.

    Attributes:
        weight: W [V, D]; where the head is tied, the token embedding itself.
        bias: b [V]; -inf bans a token. None = no bias.
        scale: factor of the logits, as Cohere's and Granite's models have one.
        cap: soft cap > 0 of the logits, as Gemma's models have one; None = no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in the precision of both."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            logits = self.scale * logits
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def detach(self) -> Self:
        """The same layer without a graph."""
        return replace(
            self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach()
        )
