"""Any causal language model of transformers as a frozen teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from limbeck.contracts import Net, Spec, Teacher
from limbeck.errors import unknown
from limbeck.nets.causal_lm import CausalLM, TextInput, check_form
from limbeck.nets.language_models import DTYPES, load_form, load_model, load_tokenizer
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
        check_form(load_form(self.model), spec, "teacher")

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        network: Any = load_model(self.model, dtype=self.dtype)
        check_form(network.config, spec, "teacher")
        return Frozen(CausalLM(network))
