"""Causal language models of transformers as networks that teach and learn."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Outputs, Spec, Unembedding
from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.taps import capture


@dataclass(frozen=True)
class TextInput:
    """What a language model reads, in the form that image networks say it in: no pixels.

    Attributes:
        channels: none.
        size: none.
        mean: none.
        std: none.
    """

    channels: int = 0
    size: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class CausalLM(Net):
    """A causal language model of transformers; it answers for the tokens that count.

    Args:
        network: the model, with ``base_model`` and an output embedding.

    Attributes:
        tokenizer: what it is saved with; None = nothing.

    Raises:
        ShapeError: its logits are not its last hidden states under its output embedding.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.tokenizer: Any = None
        self._adapters: tuple[Any, ...] = ()  # unregistered: its weights are the network's own
        check_head(network)

    def unembedding(self) -> Unembedding:
        """The last layer."""
        return unembedding(self.network)

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """What follows each token that counts.

        Args:
            batch: token ids [B, T], with ``rows`` and maybe ``segments``.
            taps: module paths inside the network; their outputs [B, T, D] keep all tokens.
            teacher: not read.
        """
        return answer(self.network, batch, taps, logits=self.projects)

    def hidden(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """The last hidden states [B, T, D] of token ids [B, T]."""
        return last_hidden(self.network, ids, segments)

    def save(self, folder: Path) -> bool:
        """Write a folder that ``from_pretrained`` loads, with the tokenizer; adapters are merged in."""
        network: Any = self.network
        if self._adapters:
            network = merged(self._adapters[0])
        network.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        return True


def answer(network: nn.Module, batch: Batch, taps: tuple[str, ...] = (), *, logits: bool = True) -> Outputs:
    """What a model says of each token of ``batch`` that counts; without ``logits`` these have no columns."""
    with capture(network, taps) as features:
        hidden = batch.counted(last_hidden(network, batch.inputs, batch.segments))
    head = unembedding(network)
    said = head.logits(hidden) if logits else hidden.new_empty(len(hidden), 0)
    return Outputs(logits=said, features=features, hidden=hidden, unembedding=head)


def last_hidden(network: nn.Module, ids: Tensor, segments: Tensor | None = None) -> Tensor:
    """A model's last hidden states [B, T, D] of token ids [B, T], of documents ``segments`` [B, T]."""
    model: Any = network
    apart = {} if segments is None else {"position_ids": places(segments)}
    found: Tensor = model.base_model(input_ids=ids, use_cache=False, **apart).last_hidden_state
    return found


def language_model(teacher: Net) -> CausalLM:
    """The language model that a teacher consists of.

    Raises:
        ConfigError: it is none, or several.
    """
    found = [part for part in teacher.modules() if isinstance(part, CausalLM)]
    if len(found) != 1:
        raise ConfigError(
            f"the teacher holds {len(found)} language models but the student is to be made of one: take "
            "causal_lm, or trained with llama or causal_lm"
        )
    return found[0]


def places(segments: Tensor) -> Tensor:
    """The place [B, T] of each token within its document, from 0.

    From these alone transformers' models tell documents in a row apart, in each kind of attention that they
    have; a mask of our own would take a sliding window away.
    """
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return place - torch.where(first, place, 0).cummax(1).values


def unembedding(network: nn.Module) -> Unembedding:
    """A model's last layer, with what its family does to the logits.

    Raises:
        ShapeError: it has no output embedding.
    """
    model: Any = network
    layer = model.get_output_embeddings()
    if layer is None:
        raise ShapeError(f"{type(network).__name__} has no output embedding: take a causal language model")
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Unembedding(layer.weight, getattr(layer, "bias", None), scale=scale, cap=cap)


@torch.no_grad()
def check_head(network: nn.Module) -> None:
    """Raise ``ShapeError`` unless the logits are the last hidden states under the output embedding."""
    model: Any = network
    with _at_rest(model):
        ids = torch.arange(4, device=_device(model))[None] % model.config.get_text_config().vocab_size
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        said = model(input_ids=ids, use_cache=False).logits[0].float()
        own = unembedding(model).logits(hidden).float()
    if not said.isfinite().all():
        return  # spoilt weights are told of where the network first answers
    close = 1e-2 * float(said.abs().max())  # half precision rounds, where a factor or a cap would show
    if said.shape != own.shape or not torch.allclose(said, own, rtol=1e-2, atol=close):
        raise ShapeError(
            f"{type(network).__name__} does more to its last hidden states than its output embedding: "
            "its logits cannot be taken apart; name another model"
        )


@torch.no_grad()
def check_packing(net: CausalLM) -> None:
    """Raise ``ShapeError`` unless a document in a row is read as if no other stood before it."""
    model: Any = net.network
    with _at_rest(model):
        ids = torch.arange(8, device=_device(model))
        ids = torch.stack([ids, torch.cat([ids[4:], ids[4:]])]) % model.config.get_text_config().vocab_size
        try:
            one, other = net.hidden(ids, (torch.arange(8, device=ids.device) > 3).long().expand(2, 8))[:, 4:]
        except TypeError:  # its forward takes no positions
            one, other = torch.zeros(1), torch.ones(1)
    if not torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.abs().max()), equal_nan=True):
        raise ShapeError(
            f"{type(model).__name__} cannot tell documents in one row apart: set data.pack to false"
        )


@contextmanager
def _at_rest(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, and afterwards as it was."""
    was = network.training
    network.eval()
    yield
    network.train(was)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def check_form(config: Any, spec: Spec, what: str) -> None:
    """Raise ``ConfigError`` where a model has fewer tokens than the tokenizer, or reads shorter rows.

    Args:
        config: the model's, of transformers.
        spec: what the data asks for.
        what: ``student`` or ``teacher``, for the message.
    """
    form = config.get_text_config()
    have, longest = form.vocab_size, getattr(form, "max_position_embeddings", None)
    if have < spec.classes:
        raise ConfigError(
            f"the {what} has {have} tokens but the tokenizer {spec.classes}: name the tokenizer of the "
            f"{what} as data.tokenizer"
        )
    if longest is not None and spec.size > longest:
        raise ConfigError(
            f"data.length is {spec.size} but the {what} reads at most {longest} tokens: set data.length to "
            f"{longest} or less"
        )


def keep_layers(network: nn.Module, kept: tuple[int, ...]) -> None:
    """Leave only those of a model's decoder layers, numbered from 0, in that order.

    Raises:
        ConfigError: a layer that is not there, or an order that is not rising.
        ShapeError: the model's layers cannot be found, or its configuration cannot say which are left.
    """
    model: Any = network
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ShapeError(f"{type(network).__name__} keeps its layers elsewhere than in base_model.layers")
    check_layers(kept, len(layers))
    model.base_model.layers = nn.ModuleList(layers[place] for place in kept)
    for place, layer in enumerate(model.base_model.layers):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = place
    config = model.config
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == len(layers):  # said of each layer: layer_types, ...
            setattr(config, name, [value[place] for place in kept])
    config.num_hidden_layers = len(kept)
    with torch.device("meta"):
        again = type(model)(copy.deepcopy(config)).state_dict()
    if {k: v.shape for k, v in again.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        raise ShapeError(f"{type(network).__name__} has layers of several kinds: set student.layers to null")


def check_layers(kept: tuple[int, ...], total: int) -> None:
    """Raise ``ConfigError`` unless ``kept`` are rising numbers of some of ``total`` layers."""
    if list(kept) != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] >= total:
        raise ConfigError(f"layers is {list(kept)} but must be rising numbers from 0 to {total - 1}")


def spread(count: int, total: int) -> tuple[int, ...]:
    """``count`` of ``total`` layers, as evenly spaced as can be, with the first and the last.

    Raises:
        ConfigError: fewer than 1 or more than there are.
    """
    if not 1 <= count <= total:
        raise ConfigError(f"layers is {count} but the model has {total}: allowed are 1 to {total}")
    if count == 1:
        return (0,)
    return tuple(round(place * (total - 1) / (count - 1)) for place in range(count))


def adapted(network: nn.Module, settings: Mapping[str, Any]) -> CausalLM:
    """``network`` with low-rank adapters (LoRA) that alone learn.

    Args:
        settings: fields of ``peft.LoraConfig``.

    Raises:
        ConfigError: peft is missing, or refuses the settings.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("lora needs the library peft: pip install 'limbeck[language]'") from error
    try:
        wrapped = _wrapped(network, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        _check_embeddings(network)
        _unloaded(_form_of(wrapped))  # what cannot be saved in the end is told now
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"lora is {dict(settings)}, which peft refuses: {str(error).splitlines()[0]}"
        ) from error
    net = CausalLM(network)
    net._adapters = (wrapped,)
    return net


def _check_embeddings(network: Any) -> None:
    """Raise ``ConfigError`` where an adapter would be on a weight that is read by another way, too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    first, last = network.get_input_embeddings(), network.get_output_embeddings()
    for layer in (last, first) if first.weight is last.weight else (last,):
        if isinstance(layer, BaseTunerLayer):
            raise ConfigError(
                "lora.target_modules names an embedding whose weight stands behind the logits too: leave it "
                "out, or name it in lora.modules_to_save"
            )


def merged(wrapped: Any) -> Any:
    """A model with the adapters of ``wrapped``, peft's, in its weights; ``wrapped`` stays as it is."""
    own = _form_of(wrapped)
    state = wrapped.state_dict()  # whole, also where ranks share the blocks out
    own.load_state_dict(copy.deepcopy(state), assign=True)
    found = _unloaded(own)
    found.generation_config = copy.deepcopy(wrapped.get_base_model().generation_config)
    return found


def _form_of(wrapped: Any) -> Any:
    """The same model and adapters without weights."""
    network = wrapped.get_base_model()
    with torch.device("meta"):
        plain = type(network)(copy.deepcopy(network.config))
        return _wrapped(plain, copy.deepcopy(wrapped.active_peft_config))


# What of peft's warnings matters is an error here: see ``adapted``.


def _wrapped(network: nn.Module, config: Any) -> Any:
    import peft

    with warnings.catch_warnings(action="ignore"):
        return peft.get_peft_model(network, config)


def _unloaded(wrapped: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return wrapped.merge_and_unload()
