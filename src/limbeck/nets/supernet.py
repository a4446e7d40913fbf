"""A transformer that holds all sub-networks of a search space in its own weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from limbeck.errors import ConfigError
from limbeck.losses.relation_heads import Projections
from limbeck.nets.search_space import Architecture, kept_layers
from limbeck.nets.slices import Cut, SharedWeights, parameter_count, whole
from limbeck.nets.taps import capture


class Supernet(SharedWeights):
    """A super network: any ``Architecture`` up to its own size runs on the bottom-left parts of its weights.

    A sub-network keeps layers floor(i · L / l), the first d channels (its norms run over these alone), the
    first d · r neurons and the first h heads, whose size stays that of the whole network. Grouped queries are
    kept by whole groups, or as the first of the first group.

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), section 3.2.
    """

    def forward(self, inputs: Tensor, architecture: Architecture | None = None, **how: Any) -> Any:
        """The model's own output for token ids [B, T]; ``how`` goes to its forward; None = all of it."""
        return self.run(self.cut(architecture), lambda small: small(input_ids=inputs, use_cache=False, **how))

    def projections(
        self, inputs: Tensor, architecture: Architecture | None = None, **how: Any
    ) -> Projections:
        """Queries, keys and values of the last layer of a sub-network; see ``last_projections``."""
        return self.run(self.cut(architecture), lambda small: last_projections(small, inputs, **how))

    def student(self, architecture: Architecture) -> nn.Module:
        """That sub-network as an ordinary model with weights of its own; see ``SharedWeights.extract``."""
        return self.extract(self.cut(architecture))

    def parameters_of(self, architecture: Architecture) -> int:
        """Exact number of parameters of a sub-network, shared ones once."""
        cut = self.cut(architecture)
        return int(
            parameter_count(self.network, cut.hidden, cut.ffn, cut.heads, cut.key_heads, len(cut.layers))
        )

    def cut(self, architecture: Architecture | None) -> Cut:
        """The part of the weights that an architecture reads.

        Raises:
            ConfigError: more layers than there are, or heads that split a group of queries.
        """
        full = whole(self.network)
        if architecture is None:
            return full
        group, heads = full.heads // full.key_heads, architecture.heads
        if heads > group and heads % group:
            raise ConfigError(
                f"heads is {heads} but the network's queries come in groups of {group}: "
                f"take at most {group} or a multiple of it"
            )
        layers = kept_layers(len(full.layers), architecture.layers)
        return Cut(layers, architecture.hidden, architecture.ffn, heads, max(heads // group, 1))


def last_projections(network: nn.Module, inputs: Tensor, **how: Any) -> Projections:
    """Queries, keys and values of a transformer's last layer, before any rotation by position.

    Args:
        network: a model of transformers of the Llama or BERT family.
        inputs: token ids [B, T].
        how: further arguments of the model's forward, for example ``attention_mask``.

    Returns:
        [B, T, heads · size], and twice [B, T, key heads · size].
    """
    body: Any = network.base_model
    taps = projection_taps(body)
    with capture(body, taps) as found:
        body(input_ids=inputs, use_cache=False, **how)
    query, key, value = (found[tap] for tap in taps)
    return query, key, value


def projection_taps(network: nn.Module) -> tuple[str, str, str]:
    """Paths of the last layer's query, key and value projections.

    Raises:
        ConfigError: a network without such projections.
    """
    ends = (("q_proj", "k_proj", "v_proj"), ("self.query", "self.key", "self.value"))
    paths = [name for name, _ in network.named_modules()]
    for query, key, value in ends:
        last = [path for path in paths if path.endswith(f".{query}")][-1:]
        for path in last:
            start = path.removesuffix(query)
            return path, f"{start}{key}", f"{start}{value}"
    raise ConfigError(
        f"{type(network).__name__} has no query, key and value projections of the Llama or BERT family"
    )
