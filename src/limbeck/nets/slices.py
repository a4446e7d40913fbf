"""Sub-networks of a transformer that read parts of its weights: which rows and columns, and at what size.

Known are the Llama family (Llama, Mistral, Qwen2, Qwen3: root-mean-square norms, gated feed-forward layers,
grouped queries, rotary positions, tied or untied heads) and BERT. The size of an attention head never
changes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.errors import ConfigError, ShapeError

T = TypeVar("T")
Axes = tuple[str | None, ...]

# What each axis of a weight counts, by the end of its module's path; a bias has the first axis alone.
AXES: dict[str, Axes] = {
    "embed_tokens": (None, "hidden"),
    "input_layernorm": ("hidden",),
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "q_norm": ("head",),
    "k_norm": ("head",),
    "o_proj": ("hidden", "query"),
    "post_attention_layernorm": ("hidden",),
    "gate_proj": ("ffn", "hidden"),
    "up_proj": ("ffn", "hidden"),
    "down_proj": ("hidden", "ffn"),
    "norm": ("hidden",),
    "lm_head": (None, "hidden"),
    "word_embeddings": (None, "hidden"),
    "position_embeddings": (None, "hidden"),
    "token_type_embeddings": (None, "hidden"),
    "LayerNorm": ("hidden",),
    "attention.self.query": ("query", "hidden"),
    "attention.self.key": ("key", "hidden"),
    "attention.self.value": ("key", "hidden"),
    "attention.output.dense": ("hidden", "query"),
    "intermediate.dense": ("ffn", "hidden"),
    "output.dense": ("hidden", "ffn"),
    "pooler.dense": ("hidden", "hidden"),
    "transform.dense": ("hidden", "hidden"),
    "predictions": (None,),
    "predictions.decoder": (None, "hidden"),
}
LAYER = re.compile(r"(.*\blayers?\.)(\d+)(\..*)")


@dataclass(frozen=True, slots=True)
class Cut:
    """What of a transformer a sub-network reads: the first channels and neurons, and some heads and layers.

    Attributes:
        layers: the layers that it keeps, rising.
        hidden: width of the hidden states.
        ffn: width of the feed-forward layers.
        heads: query heads, as many for each key head: the first of each group.
        key_heads: key and value heads, the first of them.
    """

    layers: tuple[int, ...]
    hidden: int
    ffn: int
    heads: int
    key_heads: int


def whole(network: nn.Module) -> Cut:
    """The cut that leaves everything."""
    config: Any = network.config
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers = tuple(range(config.num_hidden_layers))
    return Cut(layers, config.hidden_size, config.intermediate_size, config.num_attention_heads, keys)


def head_size(network: nn.Module) -> int:
    """Features of one attention head."""
    config: Any = network.config
    given = getattr(config, "head_dim", None) or getattr(config, "head_size", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def axes(name: str) -> Axes:
    """What each axis of the parameter ``name`` counts; None is never cut.

    Raises:
        ConfigError: it belongs to no network that this module knows.
    """
    path, _, kind = name.rpartition(".")
    parts = path.split(".")
    for start in range(len(parts)):  # the longest end first: BERT has three that end in "output.dense"
        found = AXES.get(".".join(parts[start:]))
        if found is not None:
            return found if kind == "weight" else found[:1]
    raise ConfigError(
        f"parameter {name!r} belongs to no Llama-like or BERT-like network: these alone can be cut"
    )


def check_axes(network: nn.Module) -> None:
    """Raise unless every parameter of ``network`` is known and of the size that the configuration says.

    Raises:
        ConfigError: a parameter that is not known.
        ShapeError: one of another size.
    """
    known = {name: axes(name) for name, _ in network.named_parameters()}
    full = _lengths(network, whole(network))
    for name, parameter in network.named_parameters():
        want = [n if a is None else full[a] for a, n in zip(known[name], parameter.shape, strict=True)]
        if list(parameter.shape) != want:
            raise ShapeError(
                f"parameter {name!r} is {list(parameter.shape)} but its configuration says {want}: "
                "this network is built otherwise and cannot be cut"
            )


def check_cut(network: nn.Module, cut: Cut) -> None:
    """Raise ``ConfigError`` unless ``network`` has what ``cut`` keeps."""
    full = whole(network)
    for field in ("hidden", "ffn", "heads", "key_heads"):
        value, most = getattr(cut, field), getattr(full, field)
        if not 1 <= value <= most:
            raise ConfigError(f"{field} is {value} but must be from 1 to the network's {most}")
    if (
        not cut.layers
        or list(cut.layers) != sorted(set(cut.layers))
        or not set(cut.layers) <= set(full.layers)
    ):
        raise ConfigError(f"layers is {list(cut.layers)} but must be rising numbers below {len(full.layers)}")
    group = full.heads // full.key_heads
    if cut.heads % cut.key_heads or cut.heads // cut.key_heads > group:
        raise ConfigError(
            f"heads is {cut.heads} but must be a multiple of the {cut.key_heads} key heads, "
            f"at most {group} for each"
        )


def taken(weight: Tensor, along: Axes, cut: Cut, network: nn.Module) -> Tensor:
    """The part of one of the network's parameters that ``cut`` keeps; gradients reach that part alone.

    Args:
        weight: the whole parameter, of ``network`` or of its shape.
        along: its ``axes``.
        cut: what is kept.
        network: whose heads are counted.
    """
    size, full = head_size(network), whole(network)
    lengths = _lengths(network, cut)
    for axis, kind in enumerate(along):
        if kind is None or weight.shape[axis] == lengths[kind]:
            continue
        if kind == "query":
            before, after = weight.shape[:axis], weight.shape[axis + 1 :]
            grouped = weight.reshape(*before, full.key_heads, full.heads // full.key_heads, size, *after)
            grouped = grouped.narrow(axis, 0, cut.key_heads).narrow(axis + 1, 0, cut.heads // cut.key_heads)
            weight = grouped.flatten(axis, axis + 2)
        else:
            weight = weight.narrow(axis, 0, lengths[kind])
    return weight


def parameter_count(
    network: nn.Module, hidden: Any, ffn: Any, heads: Any, key_heads: Any, layers: Any
) -> Any:
    """Parameters, shared ones once, of a cut of those sizes.

    Every size may be a tensor of expected sizes that broadcast. In the Llama family no weight has one axis
    twice, so where axes are drawn apart this is the expected count.
    """
    size = head_size(network)
    lengths = {"hidden": hidden, "ffn": ffn, "query": heads * size, "key": key_heads * size, "head": size}
    total: Any = 0
    for name, parameter in network.named_parameters():
        place = LAYER.fullmatch(name)
        if place is not None and int(place[2]) > 0:
            continue  # all layers are alike
        count: Any = 1 if place is None else layers
        for kind, length in zip(axes(name), parameter.shape, strict=True):
            count = count * (length if kind is None else lengths[kind])
        total = total + count
    return total


class SharedWeights(nn.Module):
    """A transformer whose sub-networks run on parts of its own weights.

    Args:
        network: a model of transformers; a sub-network of it is of the same kind, or of one that computes the
            same where its own kind has no such form (see ``kind_and_config``).

    Raises:
        ConfigError: a network that cannot be cut.
        ShapeError: one that is built otherwise than its configuration says.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        check_axes(network)
        self.network = network
        self._forms: dict[Cut, Holder] = {}  # without weights: not part of the state

    def run(self, cut: Cut, use: Callable[[Any], T]) -> T:
        """``use(sub-network)``, where every weight of the sub-network is a part of this network's.

        The sub-network is an ordinary model, good within ``use`` alone; what is computed there carries a
        graph to the parts. Activation checkpoints, which would run parts of it again later, are not possible.
        """
        form = self._form(cut)
        form.small.train(self.network.training)
        tensors = {f"small.{name}": part for name, part in self.parts(cut, form.small).items()}
        found: T = functional_call(form, tensors, (use,))
        return found

    def extract(self, cut: Cut) -> nn.Module:
        """An ordinary model with copies of the parts, in evaluation mode; ``save_pretrained`` writes it.

        Raises:
            ConfigError: the network has no such part.
        """
        small = without_weights(self.network, cut)
        for name, part in self.parts(cut, small).items():
            path, _, leaf = name.rpartition(".")
            owner, copied = small.get_submodule(path), part.detach().clone()
            learns = isinstance(getattr(owner, leaf), nn.Parameter)
            setattr(owner, leaf, nn.Parameter(copied) if learns else copied)
        small.tie_weights()
        model: nn.Module = small.eval()
        return model

    def parts(self, cut: Cut, small: nn.Module) -> dict[str, Tensor]:
        """The parameters and buffers of the sub-network ``small``, by its names for them."""
        own = dict(self.network.named_parameters())
        found = {
            name: taken(own[self._source(name, cut)], axes(name), cut, self.network)
            for name, _ in small.named_parameters()
        }
        buffers = dict(self.network.named_buffers())
        return found | {name: buffers[self._source(name, cut)] for name, _ in small.named_buffers()}

    @staticmethod
    def _source(name: str, cut: Cut) -> str:
        place = LAYER.fullmatch(name)
        return name if place is None else f"{place[1]}{cut.layers[int(place[2])]}{place[3]}"

    def _form(self, cut: Cut) -> Holder:
        if cut not in self._forms:
            self._forms[cut] = Holder(without_weights(self.network, cut))
        return self._forms[cut]


class Holder(nn.Module):
    """Lends a network to a function, so that ``functional_call`` serves more than its forward."""

    def __init__(self, small: nn.Module) -> None:
        super().__init__()
        self.small = small

    def forward(self, use: Callable[[Any], T]) -> T:
        return use(self.small)


def without_weights(network: nn.Module, cut: Cut) -> Any:
    """A model of the size of ``cut`` on torch's meta device.

    Raises:
        ConfigError: the network has no such part.
    """
    check_cut(network, cut)
    kind, config = kind_and_config(network, cut)
    dtype = next(network.parameters()).dtype
    with torch.device("meta"):
        small: Any = kind._from_config(config, dtype=dtype)
    return small


def kind_and_config(network: nn.Module, cut: Cut) -> tuple[Any, Any]:
    """Class and configuration of a cut.

    Llama's configuration refuses a width that is no multiple of the heads, though its network does not mind:
    such a cut is a Mistral, which computes the same. BERT cuts its width into heads: a cut with heads of
    another size is a ``SlicedBertModel``.

    Raises:
        ConfigError: a Llama with biases would have to be a Mistral.
    """
    kind: Any = type(network)
    config: Any = copy.deepcopy(network.config)
    size = head_size(network)
    sizes: dict[str, Any] = {
        "hidden_size": cut.hidden,
        "intermediate_size": cut.ffn,
        "num_hidden_layers": len(cut.layers),
        "num_attention_heads": cut.heads,
    }
    if getattr(config, "layer_types", None) is not None:
        sizes["layer_types"] = [config.layer_types[place] for place in cut.layers]
    if config.model_type in BERTS:
        if cut.hidden == cut.heads * size and config.model_type == "bert":
            return kind, _changed(config, sizes)
        return _as_sliced_bert(kind, config, {**sizes, "head_size": size})
    sizes |= {"num_key_value_heads": cut.key_heads, "head_dim": size}
    if config.model_type == "llama" and cut.hidden % cut.heads:
        return _as_mistral(kind, config, sizes)
    return kind, _changed(config, sizes)


BERTS = ("bert", "sliced_bert")


def _changed(config: Any, sizes: Mapping[str, Any]) -> Any:
    for field, value in sizes.items():
        setattr(config, field, value)
    return config


def _as_mistral(kind: Any, config: Any, sizes: Mapping[str, Any]) -> tuple[Any, Any]:
    from transformers import MistralConfig, MistralForCausalLM, MistralModel

    kinds: dict[str, Any] = {"LlamaForCausalLM": MistralForCausalLM, "LlamaModel": MistralModel}
    if kind.__name__ not in kinds or config.attention_bias or config.mlp_bias:
        raise ConfigError(
            f"a {kind.__name__} of width {sizes['hidden_size']} with {sizes['num_attention_heads']} heads "
            "cannot be a model of its own: let the heads divide the width"
        )
    fields = MistralConfig().to_dict().keys() - {"model_type", "architectures", "sliding_window"}
    same = {k: v for k, v in config.to_dict().items() if k in fields}
    new = MistralConfig(**{**same, **sizes}, sliding_window=None)
    new._attn_implementation = config._attn_implementation
    return kinds[kind.__name__], new


def _as_sliced_bert(kind: Any, config: Any, sizes: Mapping[str, Any]) -> tuple[Any, Any]:
    from limbeck.nets import sliced_bert

    name = kind.__name__.removeprefix("Sliced")
    new = sliced_bert.SlicedBertConfig(**{**config.to_dict(), **sizes})
    new._attn_implementation = config._attn_implementation
    return sliced_bert.kind(name), new


def _lengths(network: nn.Module, cut: Cut) -> dict[str, int]:
    size = head_size(network)
    return {
        "hidden": cut.hidden,
        "ffn": cut.ffn,
        "query": cut.heads * size,
        "key": cut.key_heads * size,
        "head": size,
    }
