"""Any causal language model of transformers as a student, whole or some of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from limbeck.contracts import Net, Spec, Student
from limbeck.errors import unknown
from limbeck.nets.backbones import seeded
from limbeck.nets.causal_lm import CausalLM, TextInput, adapted, check_form, check_layers, keep_layers, spread
from limbeck.nets.language_models import DTYPES, load_form, load_model, load_tokenizer


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
        """No pixels."""
        return TextInput()

    def reads_text(self) -> bool:
        """It does."""
        return True

    def tokenizer(self) -> Any:
        """See ``Network.tokenizer``."""
        return load_tokenizer(self.model)

    def check(self, spec: Spec) -> None:
        """See ``Network.check``."""
        form = load_form(self.model)
        check_form(form, spec, "student")
        if self.layers is not None:
            self._kept(form.get_text_config().num_hidden_layers)

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        with seeded(generator):
            network: Any = load_model(self.model, dtype=self.dtype, weights=self.pretrained)
            check_form(network.config, spec, "student")
            if self.layers is not None:
                keep_layers(network, self._kept(network.config.num_hidden_layers))
            return adapted(network, self.lora) if self.lora else CausalLM(network)

    def _kept(self, total: int) -> tuple[int, ...]:
        """Which of the model's ``total`` layers are kept."""
        kept = spread(self.layers, total) if isinstance(self.layers, int) else self.layers or ()
        check_layers(kept, total)
        return kept
