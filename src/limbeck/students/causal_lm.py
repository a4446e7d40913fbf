"""Any causal language model of transformers as a student, whole or some of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from limbeck.contracts import Net, Spec, Student
from limbeck.errors import unknown
from limbeck.nets.backbones import seeded
from limbeck.nets.causal_lm import CausalLM, TextInput, adapted, fit_vocabulary, keep_layers, spread
from limbeck.nets.language_models import DTYPES, load_model, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class CausalLMStudent(Student):
    """Any causal language model of transformers; all of it learns, or low-rank adapters in it.

    Attributes:
        model: a name on the Hugging Face hub, a local folder, or a ``.gguf`` file.
        layers: keep so many of the model's layers, evenly spaced with the first and the last, or just those
            named, from 0; None = all.
        pretrained: start from the model's weights; else from its form alone.
        lora: fields of ``peft.LoraConfig``, such as ``{r: 8, lora_alpha: 16}``: then only adapters learn, and
            are merged when the student is saved. Empty = all learns.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ConfigError: another dtype.
    """

    model: str
    layers: int | tuple[int, ...] | None = None
    pretrained: bool = True
    lora: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)

    def input_spec(self) -> TextInput:
        """It reads text."""
        return TextInput()

    def tokenizer(self) -> Any:
        """See ``Network.tokenizer``."""
        return load_tokenizer(self.model)

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        with seeded(generator):
            network: Any = load_model(self.model, dtype=self.dtype, weights=self.pretrained)
            fit_vocabulary(network, spec, "student")
            if self.layers is not None:
                whole = len(network.base_model.layers)
                keep_layers(
                    network, spread(self.layers, whole) if isinstance(self.layers, int) else self.layers
                )
            return adapted(network, self.lora) if self.lora else CausalLM(network)
