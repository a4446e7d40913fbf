"""An elastic language model: nested networks in one parent, a router that chooses their sizes.

The parent's widths stand in order of importance (``importance.sort_by_importance``), so that every smaller
network is a prefix on each axis; its layers have ranks. A size runs in two ways that agree: on parts of the
weights, or under masks, which may be soft and then carry a gradient to the router.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import ConfigError, ShapeError
from limbeck.losses.elastic import (
    Mode,
    expected_cost,
    gumbel_softmax,
    mixed_mask,
    prefix_masks,
)
from limbeck.losses.reduction import full_precision
from limbeck.nets.backbones import seeded
from limbeck.nets.importance import decoder, evaluating
from limbeck.nets.slices import Cut, SharedWeights, parameter_count, whole, without_weights

ALIKE = 1e-4  # how far an all-ones mask may move an output, relative to the largest


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a budget keeps of each axis.

    Attributes:
        hidden: embedding channels.
        ffn: neurons of each feed-forward layer.
        heads: query heads of each layer, as many for each key head.
        layers: layers.
    """

    hidden: int
    ffn: int
    heads: int
    layers: int


@dataclass(frozen=True, slots=True)
class Options:
    """The sizes that a router may choose from on each axis, as in ``Sizes``."""

    hidden: tuple[int, ...]
    ffn: tuple[int, ...]
    heads: tuple[int, ...]
    layers: tuple[int, ...]


AXES = tuple(field.name for field in fields(Options))


@dataclass(frozen=True)
class Masks:
    """What is active on each axis, from 0 to 1, of a whole batch [n] or of each text [B, n].

    Attributes:
        hidden: embedding channels, [D] or [B, D].
        ffn: neurons of every layer, [F] or [B, F].
        heads: query heads of every layer, [H] or [B, H].
        layers: γ, the layers, [N] or [B, N].
    """

    hidden: Tensor
    ffn: Tensor
    heads: Tensor
    layers: Tensor


class ElasticLM(SharedWeights):
    """A parent language model and all its nested networks.

    Args:
        network: a causal language model of the Llama family, its widths sorted by importance.
        layer_ranks: of its layers [N] int64, 0 = the most important (``importance.rank_layers``).

    Raises:
        ConfigError: a network of another family, or ranks that are no permutation.
        ShapeError: a network whose outputs a mask of ones changes.

    Source: Nemotron Elastic (arXiv 2511.16664), section 3.
    Differs: one size per axis for all layers; the paper can also choose them by layer. Cuts no Mamba layers:
    ``losses.mamba_mask`` says which heads and channels they would keep.
    """

    layer_ranks: Tensor

    def __init__(self, network: nn.Module, layer_ranks: Tensor) -> None:
        super().__init__(network)
        decoder(network)
        count = len(whole(network).layers)
        if sorted(layer_ranks.tolist()) != list(range(count)):
            raise ConfigError(
                f"layer_ranks is {layer_ranks.tolist()} but must hold 0 to {count - 1} once each"
            )
        self.register_buffer("layer_ranks", layer_ranks.clone())
        self._check_masks()

    def forward(self, inputs: Tensor, sizes: Sizes | None = None, **how: Any) -> Any:
        """The model's own output for token ids [B, T] on the parts that ``sizes`` keep; None = the parent."""
        cut = self.cut(self.full if sizes is None else sizes)
        return self.run(cut, lambda small: small(input_ids=inputs, use_cache=False, **how))

    def slice_model(self, sizes: Sizes) -> nn.Module:
        """That nested network as an ordinary model with weights of its own; ``save_pretrained`` writes it."""
        return self.extract(self.cut(sizes))

    @property
    def full(self) -> Sizes:
        """The sizes of the parent."""
        cut = whole(self.network)
        return Sizes(cut.hidden, cut.ffn, cut.heads, len(cut.layers))

    def cut(self, sizes: Sizes) -> Cut:
        """The part of the weights that ``sizes`` keep: prefixes, and the layers of the lowest ranks in order.

        Raises:
            ConfigError: more layers than there are.
        """
        full = whole(self.network)
        if not 1 <= sizes.layers <= len(full.layers):
            raise ConfigError(f"layers is {sizes.layers} but must be from 1 to {len(full.layers)}")
        kept = (self.layer_ranks < sizes.layers).nonzero().flatten().tolist()
        return Cut(tuple(kept), sizes.hidden, sizes.ffn, sizes.heads, full.key_heads)

    def check(self, sizes: Sizes) -> None:
        """Raise ``ConfigError`` unless those sizes are a network that can be cut out."""
        without_weights(self.network, self.cut(sizes))

    def option_masks(self, options: Options) -> dict[str, Tensor]:
        """By axis the nested masks of its options, [options, n] bool.

        Raises:
            ConfigError: an option that the network has not, or heads that are no multiple of the key heads.
        """
        full, groups = self.full, whole(self.network).key_heads
        for heads in options.heads:
            if heads % groups:
                raise ConfigError(f"heads is {heads} but must be a multiple of the {groups} key heads")
        place = self.layer_ranks.device
        in_group = torch.arange(full.heads, device=place) % (full.heads // groups)
        return {
            "hidden": prefix_masks(torch.arange(full.hidden, device=place), options.hidden),
            "ffn": prefix_masks(torch.arange(full.ffn, device=place), options.ffn),
            "heads": prefix_masks(in_group, [heads // groups for heads in options.heads]),
            "layers": prefix_masks(self.layer_ranks, options.layers),
        }

    def masks(self, sizes: Sizes) -> Masks:
        """The masks of 0 and 1 that keep what ``sizes`` keep."""
        one = Options((sizes.hidden,), (sizes.ffn,), (sizes.heads,), (sizes.layers,))
        dtype = next(self.network.parameters()).dtype
        return Masks(**{axis: masks[0].to(dtype) for axis, masks in self.option_masks(one).items()})

    def parameters_of(self, sizes: Sizes) -> int:
        """Exact number of parameters of a nested network, shared ones once."""
        keys = whole(self.network).key_heads
        return int(parameter_count(self.network, sizes.hidden, sizes.ffn, sizes.heads, keys, sizes.layers))

    def _check_masks(self) -> None:
        model: Any = self.network
        ids = torch.arange(4, device=self.layer_ranks.device)[None] % model.config.vocab_size
        with torch.no_grad(), evaluating(self.network):
            plain = model(input_ids=ids, use_cache=False).logits
            with masked(self.network, self.masks(self.full)):
                ones = model(input_ids=ids, use_cache=False).logits
        if not torch.allclose(plain, ones, rtol=0, atol=ALIKE * float(plain.abs().max())):
            raise ShapeError(
                f"{type(self.network).__name__} gives something else under a mask of ones: its layers are "
                "not those of the Llama family"
            )


def rounded_options(elastic: ElasticLM, shares: Mapping[str, Sequence[float]]) -> Options:
    """By axis the sizes next to ``shares`` of the parent's, rising, and at least 1.

    Heads are in whole numbers for each key head.
    """
    full, keys = elastic.full, whole(elastic.network).key_heads
    steps = {"heads": keys}

    def counts(axis: str) -> tuple[int, ...]:
        step, total = steps.get(axis, 1), getattr(full, axis)
        return tuple(sorted({step * max(1, round(share * total / step)) for share in shares[axis]}))

    return Options(**{axis: counts(axis) for axis in AXES})


def active_rms_norm(x: Tensor, weight: Tensor, eps: float, mask: Tensor) -> Tensor:
    """Root-mean-square norm over the active channels, 0 in the others.

    Args:
        x: [..., D].
        weight: [D].
        eps: what is added to the mean square.
        mask: [..., D], >= 0; soft values weigh the mean.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 20 onwards.
    Differs: the paper masks after a norm over all channels; over the active ones a mask equals a slice.
    """
    wide = full_precision(x)
    # Written so that a mask of ones gives the plain norm to the last bit.
    mean = (wide.square() * mask).mean(-1, keepdim=True) * (x.shape[-1] / mask.sum(-1, keepdim=True))
    return weight * (wide * torch.rsqrt(mean + eps)).to(x.dtype) * mask


@contextmanager
def masked(network: nn.Module, masks: Masks) -> Iterator[None]:
    """Within the context, the network runs with the masks on every axis; gradients reach weights and masks.

    A layer of γ = 0 changes nothing, an inactive channel is 0 after every layer, and an inactive head or
    neuron adds nothing.

    Args:
        network: a model of the Llama family.
        masks: over the whole batch, or one for each text.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 20 to 51.
    """
    body = decoder(network)
    hidden, ffn = _by_token(masks.hidden), _by_token(masks.ffn)
    with ExitStack() as hooks:

        def scale_output(module: nn.Module, factor: Tensor) -> None:
            hooks.callback(module.register_forward_hook(lambda _m, _i, output: output * factor).remove)

        def scale_input(module: nn.Module, factor: Tensor) -> None:
            hooks.callback(module.register_forward_pre_hook(lambda _m, given: (given[0] * factor,)).remove)

        def norm(module: Any) -> None:
            eps = getattr(module, "variance_epsilon", None)
            if eps is None:
                raise ShapeError(
                    f"{type(module).__name__} is no norm of the Llama family: it cannot be masked"
                )

            def over_active(_module: nn.Module, given: tuple[Tensor, ...], _output: Tensor) -> Tensor:
                return active_rms_norm(given[0], module.weight, eps, hidden)

            hooks.callback(module.register_forward_hook(over_active).remove)

        scale_output(body.embed_tokens, hidden)
        norm(body.norm)
        for place, layer in enumerate(body.layers):
            kept = _by_token(masks.layers[..., place, None])  # of each of the layer's two parts
            heads = _by_token(masks.heads.repeat_interleave(layer.self_attn.head_dim, dim=-1))
            norm(layer.input_layernorm)
            scale_input(layer.self_attn.o_proj, heads)
            scale_output(layer.self_attn.o_proj, hidden * kept)
            norm(layer.post_attention_layernorm)
            scale_input(layer.mlp.down_proj, ffn)
            scale_output(layer.mlp.down_proj, hidden * kept)
        yield


class Router(nn.Module):
    """Chooses a size on every axis for a budget: one small perceptron per axis.

    Args:
        budgets: n_b, how many budgets there are.
        options: what there is to choose from.
        generator: source of the first weights.
        width: of the hidden layer.
        slope: of LeakyReLU below 0; the paper gives none.

    Source: Nemotron Elastic (arXiv 2511.16664), eq. 6 to 8.
    """

    def __init__(
        self,
        budgets: int,
        options: Options,
        generator: torch.Generator,
        width: int = 256,
        slope: float = 0.01,
    ) -> None:
        super().__init__()
        self.options = options
        with seeded(generator):
            self.heads = nn.ModuleDict(
                {axis: _perceptron(budgets, width, len(getattr(options, axis)), slope) for axis in AXES}
            )

    def forward(self, budget: Tensor) -> dict[str, Tensor]:
        """Logits [..., options] by axis for budgets one-hot [..., n_b]."""
        return {axis: head(budget) for axis, head in self.heads.items()}

    def choose(self, budget: Tensor) -> Sizes:
        """The sizes for one budget [n_b] after training: the largest logit of each axis, no noise."""
        with torch.no_grad():
            best = {axis: int(logits.argmax()) for axis, logits in self(budget).items()}
        return Sizes(**{axis: getattr(self.options, axis)[place] for axis, place in best.items()})


def _perceptron(inputs: int, width: int, outputs: int, slope: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.LeakyReLU(slope), nn.Linear(width, outputs))


def gumbel_noise(logits: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A draw of the Gumbel distribution for each logit, by axis."""
    found = {}
    for axis, z in logits.items():
        uniform = torch.rand(z.shape, generator=generator, dtype=torch.float64)
        found[axis] = (-(-uniform.clamp(min=1e-300).log()).log()).to(z)
    return found


def route(
    logits: Mapping[str, Tensor], noise: Mapping[str, Tensor], temperature: float, scale: float = 1.0
) -> dict[str, Tensor]:
    """How probable each option of each axis is while the router learns: ``losses.gumbel_softmax`` by axis.

    Args:
        logits: of the router, [..., options].
        noise: ``gumbel_noise``, or zeros.
        temperature: τ, see ``losses.gumbel_temperature``.
        scale: factor of the logits, see ``losses.router_logit_scale``.
    """
    return {axis: gumbel_softmax(scale * z, noise[axis], temperature) for axis, z in logits.items()}


def routed_masks(
    option_masks: Mapping[str, Tensor],
    logits: Mapping[str, Tensor],
    probabilities: Mapping[str, Tensor],
    mode: Mode = "soft",
) -> Masks:
    """The masks to train with under what the router chose; see ``losses.mixed_mask``."""
    return Masks(**{a: mixed_mask(option_masks[a], logits[a], probabilities[a], mode) for a in AXES})


def expected_parameters(elastic: ElasticLM, options: Options, probabilities: Mapping[str, Tensor]) -> Tensor:
    """How many parameters the router's choice has on average, as a share of the parent's: [...] in (0, 1].

    The axes are drawn apart and no weight has one axis twice, so the mean of the count is the count of the
    mean sizes.
    """
    sizes = {
        axis: expected_cost(p, torch.tensor(getattr(options, axis), dtype=p.dtype, device=p.device))
        for axis, p in probabilities.items()
    }
    keys = whole(elastic.network).key_heads
    count: Tensor = parameter_count(elastic.network, key_heads=keys, **sizes)
    return count / elastic.parameters_of(elastic.full)


def _by_token(mask: Tensor) -> Tensor:
    """A mask that broadcasts against [B, T, n]: [n] as it is, [B, n] as [B, 1, n]."""
    return mask if mask.ndim < 2 else mask.unsqueeze(-2)
