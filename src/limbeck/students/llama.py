"""A language model of the Llama family that starts from nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limbeck.contracts import Net, Spec, Student
from limbeck.errors import ConfigError
from limbeck.nets.backbones import seeded
from limbeck.nets.causal_lm import CausalLM, TextInput
from limbeck.nets.language_models import the_library


@dataclass(frozen=True, kw_only=True)
class LlamaStudent(Student):
    """A transformer of the Llama family of any size, with fresh weights and the data's vocabulary.

    Its taps are transformers' module paths, such as ``model.layers.-1.mlp``.

    Attributes:
        layers: of the decoder.
        width: D, a multiple of ``heads``.
        heads: of the attention.
        kv_heads: heads of keys and values, a divisor of ``heads``; None = as many.
        mlp: width of the feed-forward layers; None = 8 / 3 of ``width``, rounded up to a multiple of 8.
        tied: whether input and output embeddings are one.

    Raises:
        ConfigError: a field out of its range.
    """

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int | None = None
    mlp: int | None = None
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "mlp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: allowed are values of at least 1")
        if self.width % (2 * self.heads):
            raise ConfigError(f"width is {self.width} but must be a multiple of twice the {self.heads} heads")
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"kv_heads is {self.kv_heads} but must divide the {self.heads} heads")

    def input_spec(self) -> TextInput:
        """No pixels."""
        return TextInput()

    def reads_text(self) -> bool:
        """It does."""
        return True

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        library = the_library()
        config = library.LlamaConfig(
            vocab_size=spec.classes, hidden_size=self.width, num_hidden_layers=self.layers,
            intermediate_size=self.mlp or 8 * -(-self.width // 3), num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads, max_position_embeddings=max(spec.size, 512),
            tie_word_embeddings=self.tied, bos_token_id=spec.special.get("bos"),
            eos_token_id=spec.special.get("eos"), pad_token_id=spec.special.get("pad"),
        )  # fmt: skip
        with seeded(generator):
            return CausalLM(library.LlamaForCausalLM(config))
