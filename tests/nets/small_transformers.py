"""Tiny transformers with random weights."""

from __future__ import annotations

from typing import Any

import torch

import limbeck.nets  # noqa: F401  # makes transformers importable beside a CPU-only torch

VOCABULARY = 50


def llama(kind: str = "Llama", **fields: Any) -> Any:
    """A causal language model of 4 layers, width 32, 4 heads of 8 that share 2 key heads."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            **fields,
        }
    )
    return spread(getattr(transformers, f"{kind}ForCausalLM")(config))


def bert(kind: str = "BertModel", **fields: Any) -> Any:
    """A BERT: 3 layers, width 32, 4 heads of 8."""
    import transformers

    config = transformers.BertConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            **fields,
        }
    )
    return spread(getattr(transformers, kind)(config))


def spread(network: Any) -> Any:
    """Weights far enough from 0, and norms from 1, that a mistake shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return network.eval()


def ids(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape or (2, 7), generator=torch.Generator().manual_seed(seed))
