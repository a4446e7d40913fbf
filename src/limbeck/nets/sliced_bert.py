"""BERT whose attention heads have a size of their own: what a cut of a BERT is.

transformers' BERT cuts its width into heads, so that a network of width 352 with 10 heads of 64 has no form
in it. Once this module is imported, ``AutoConfig`` and ``AutoModel`` know these networks too.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel

from limbeck.errors import ConfigError


class SlicedBertConfig(BertConfig):  # type: ignore[no-untyped-call]
    """BERT's configuration and ``head_size``, the features of one attention head."""

    model_type = "sliced_bert"
    head_size: int = 64
    embedding_size: int | None = None  # its presence alone makes BERT's attention accept any width


class SlicedBertModel(BertModel):  # type: ignore[no-untyped-call]
    """``BertModel`` with heads of ``config.head_size`` features."""

    config_class = SlicedBertConfig

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        resize_heads(self, config)


class SlicedBertForMaskedLM(BertForMaskedLM):  # type: ignore[no-untyped-call]
    """``BertForMaskedLM`` with heads of ``config.head_size`` features."""

    config_class = SlicedBertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        resize_heads(self, config)


def resize_heads(model: Any, config: Any) -> None:
    """Give every attention of a BERT heads of ``config.head_size`` features, with new weights."""
    width = config.num_attention_heads * config.head_size
    for layer in model.base_model.encoder.layer:
        attention = layer.attention.self
        attention.attention_head_size = config.head_size
        attention.all_head_size = width
        attention.scaling = config.head_size**-0.5
        for name in ("query", "key", "value"):
            setattr(attention, name, nn.Linear(config.hidden_size, width))
        layer.attention.output.dense = nn.Linear(width, config.hidden_size)
    model.post_init()


def kind(name: str) -> Any:
    """The class here that stands for transformers' class ``name``.

    Raises:
        ConfigError: there is none.
    """
    kinds = {"BertModel": SlicedBertModel, "BertForMaskedLM": SlicedBertForMaskedLM}
    if name not in kinds:
        raise ConfigError(f"a {name} cannot be cut: take one of {', '.join(kinds)}")
    return kinds[name]


AutoConfig.register("sliced_bert", SlicedBertConfig)
AutoModel.register(SlicedBertConfig, SlicedBertModel)
AutoModelForMaskedLM.register(SlicedBertConfig, SlicedBertForMaskedLM)
