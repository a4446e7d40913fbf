"""Any causal language model of transformers as a frozen teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from limbeck.contracts import Net, Spec, Teacher
from limbeck.errors import unknown
from limbeck.nets.causal_lm import CausalLM, TextInput, fit_vocabulary
from limbeck.nets.language_models import DTYPES, load_model, load_tokenizer
from limbeck.nets.taps import Frozen


@dataclass(frozen=True, kw_only=True)
class CausalLMTeacher(Teacher):
    """Any causal language model of transformers, frozen.

    Attributes:
        model: a name on the Hugging Face hub, a local folder, or a ``.gguf`` file.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ConfigError: another dtype.
    """

    model: str
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
        network = load_model(self.model, dtype=self.dtype)
        fit_vocabulary(network, spec, "teacher")
        return Frozen(CausalLM(network))
