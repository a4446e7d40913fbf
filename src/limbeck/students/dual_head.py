"""A student with a second head on the features that its classifier reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Outputs, Spec, Student, check_width
from limbeck.errors import CheckpointError, ConfigError
from limbeck.nets.backbones import read_weights
from limbeck.nets.heads import build_head
from limbeck.nets.two_heads import cosine_logits, mixed_log_probs, search_mix, text_head
from limbeck.nets.wrapped import Wrapped, embed, last_linear


@dataclass(frozen=True, kw_only=True)
class DualHead(Student):
    """Any student with a linear classifier, and a second one beside it that learns from the teacher.

    ``logits`` are the classifier's, ``soft_logits`` the second head's. It answers with a mixture of their
    probabilities. Weight and temperature of the mixture are searched on validation samples after training,
    where the scenario holds some out; else they are as given.

    Attributes:
        network: the student.
        ce_weight: weight of the classifier in the answer, in [0, 1].
        temperature: of the second head in the answer, > 0.
        search: choose both on validation samples where there are any.
        text_weights: a safetensors file with the tensor ``text_weights`` [D, C], the mean embedding of each
            class's prompts: both heads start there, and the second reads features of length 1, times 100.
            None = both start at random.

    Raises:
        ConfigError: a field out of its range.

    Source: DHO (arXiv 2505.07675), official code.
    """

    network: Student
    ce_weight: float = 0.5
    temperature: float = 1.0
    search: bool = True
    text_weights: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ce_weight <= 1:
            raise ConfigError(f"ce_weight is {self.ce_weight}: allowed are values from 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}: allowed are finite values above 0")

    def input_spec(self) -> Any:
        """See ``Network.input_spec``."""
        return self.network.input_spec()

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        return TwoHeads(self, self.network.build(spec, generator), spec.classes, generator)


class TwoHeads(Wrapped):
    """A network and its second head."""

    ce_weight: Tensor
    temperature: Tensor

    def __init__(self, choice: DualHead, inner: Net, classes: int, generator: torch.Generator) -> None:
        super().__init__(inner)
        self.choice = choice
        head = last_linear(inner, classes)
        self._head = (head,)  # in a tuple: it is registered within
        self.kd_head: nn.Module = build_head("linear", head.in_features, classes, generator)
        if choice.text_weights is not None:
            start = read_text_weights(choice.text_weights, head)
            head.load_state_dict(start.state_dict())
            self.kd_head = start
        self.register_buffer("ce_weight", torch.tensor(choice.ce_weight))
        self.register_buffer("temperature", torch.tensor(choice.temperature))

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """The inner outputs, with the second head's logits."""
        out, feature = embed(self.inner, self._head[0], batch, taps, teacher)
        plain = self.choice.text_weights is None
        soft = self.kd_head(feature) if plain else cosine_logits(feature, self.kd_head)
        return replace(out, soft_logits=soft)

    def predict(self, outputs: Outputs) -> Tensor:
        """Log-probabilities [B, C] of the mixture."""
        return mixed_log_probs(outputs.logits, outputs.soft, self.ce_weight, self.temperature)

    def tune(self, outputs: Sequence[Outputs], labels: Tensor) -> dict[str, float]:
        """The best mixture on validation samples; see ``search_mix``."""
        if not self.choice.search:
            return {}
        logits = torch.cat([out.logits for out in outputs])
        _, weight, temperature = search_mix(logits, torch.cat([out.soft for out in outputs]), labels)
        return {"ce_weight": weight, "temperature": temperature}

    def tuned(self, chosen: Mapping[str, float]) -> None:
        """See ``Net.tuned``."""
        for name, value in chosen.items():
            self.get_buffer(name).fill_(value)


def read_text_weights(path: str, head: nn.Linear) -> nn.Linear:
    """A head like ``head`` that starts at the text embeddings in the file at ``path``.

    Raises:
        CheckpointError: the file is not there, damaged, or holds no such tensor.
        ShapeError: they are for other features or classes.
    """
    given = read_weights(path)
    if "text_weights" not in given:
        raise CheckpointError(f"{path} holds {', '.join(given) or 'nothing'}: save the tensor text_weights")
    width, classes = given["text_weights"].shape
    check_width(f"the width of text_weights in {path}", width, head.in_features, "embed with its text tower")
    check_width(f"the classes of text_weights in {path}", classes, head.out_features, "embed each class once")
    return text_head(given["text_weights"])
