"""Spaces of transformer architectures to search in: which there are, what they cost, which is best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from limbeck.errors import ConfigError, NonFiniteError


@dataclass(frozen=True, slots=True)
class Architecture:
    """A sub-network of a transformer.

    Attributes:
        layers: l, number of layers.
        hidden: d, width of the hidden states.
        ratio: r, width of the feed-forward layers over d.
        heads: h, attention heads; each keeps the whole network's head size.

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), section 3.1.
    """

    layers: int
    hidden: int
    ratio: float
    heads: int

    @property
    def ffn(self) -> int:
        """Width of the feed-forward layers; what a decimal r leaves of rounding errors is taken off first."""
        return int(round(self.hidden * self.ratio, 6))


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All combinations of the values of each axis, given in rising order.

    Attributes:
        layers: choices of l.
        hidden: choices of d.
        ratio: choices of r.
        heads: choices of h.

    Raises:
        ConfigError: an axis without values, or whose values do not rise from above 0.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ratio: tuple[float, ...]
    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        for axis in ("layers", "hidden", "ratio", "heads"):
            values: tuple[float, ...] = getattr(self, axis)
            if not values or values[0] <= 0 or any(a >= b for a, b in itertools.pairwise(values)):
                raise ConfigError(f"{axis} is {list(values)} but must be rising numbers above 0")

    def architectures(self) -> tuple[Architecture, ...]:
        """All of them, the last axis fastest."""
        return tuple(
            Architecture(layers=n, hidden=d, ratio=r, heads=h)
            for n, h, d, r in itertools.product(self.layers, self.heads, self.hidden, self.ratio)
        )

    @property
    def smallest(self) -> Architecture:
        """The least of every axis."""
        return Architecture(self.layers[0], self.hidden[0], self.ratio[0], self.heads[0])

    @property
    def largest(self) -> Architecture:
        """The most of every axis."""
        return Architecture(self.layers[-1], self.hidden[-1], self.ratio[-1], self.heads[-1])


# The paper's three sub-spaces of 256 each, for a teacher of (12, 768, 4, 12); section 3.1, table 1.
TINY = SearchSpace((4, 5, 6, 7), (128, 160, 192, 224), (2.0, 2.5, 3.0, 3.5), (7, 8, 9, 10))
SMALL = SearchSpace((9, 10, 11, 12), (256, 288, 320, 352), (2.5, 3.0, 3.5, 4.0), (7, 8, 9, 10))
BASE = SearchSpace((9, 10, 11, 12), (544, 576, 608, 640), (2.5, 3.0, 3.5, 4.0), (9, 10, 11, 12))


def sandwich(space: SearchSpace, others: int, generator: torch.Generator) -> tuple[Architecture, ...]:
    """The sub-networks of one step: the largest, the smallest, and ``others`` distinct ones of the rest.

    A space with fewer gives all it has. Seed the generator from the step and a resumed run draws the same.

    Args:
        space: what is drawn from.
        others: M, how many besides the two; the paper's is 2.
        generator: source of the draw.

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), section 3.2.
    """
    ends = tuple(dict.fromkeys((space.largest, space.smallest)))
    rest = [a for a in space.architectures() if a not in ends]
    drawn = torch.randperm(len(rest), generator=generator)[:others].tolist()
    return (*ends, *(rest[place] for place in drawn))


def drawn(space: SearchSpace, count: int, generator: torch.Generator) -> tuple[Architecture, ...]:
    """``count`` distinct sub-networks, each as likely as the others: a step without the ends of a sandwich.

    A space with fewer gives all it has.
    """
    every = space.architectures()
    return tuple(every[place] for place in torch.randperm(len(every), generator=generator)[:count].tolist())


def kept_layers(total: int, kept: int) -> tuple[int, ...]:
    """The layers of ``total`` that a sub-network of ``kept`` layers takes: floor(i · total / kept).

    The first is always 0; the last one of ``total`` is there only if all are.

    Raises:
        ConfigError: ``kept`` not in 1 .. ``total``.

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), section 3.2.
    Differs: the paper says "alternate layers"; this is its code's rule, in integers.
    """
    if not 1 <= kept <= total:
        raise ConfigError(f"layers is {kept} but must be from 1 to the {total} there are")
    return tuple(i * total // kept for i in range(kept))


def released_parameters(
    architecture: Architecture, *, most_heads: int, vocabulary: int, positions: int = 512, types: int = 2
) -> float:
    """The parameter count by which the authors' code orders a space of BERT encoders.

    It takes the query, key and value matrices as d × d · h / h_max, though they have h · 64 rows: use
    ``slices.parameter_count`` for a budget.

    Args:
        architecture: what is counted.
        most_heads: h_max of the whole network.
        vocabulary: number of tokens.
        positions: rows of the position embedding.
        types: rows of the token type embedding.

    Source: the code of Xu et al., NeurIPS 2022 (arXiv 2201.12507).
    """
    d, r = architecture.hidden, architecture.ratio
    embeddings = d * (vocabulary + positions + types + 2)
    attention = d**2 + 3 * d**2 * architecture.heads / most_heads + 4 * d + 2 * d
    feed_forward = 2 * d**2 * r + r * d + d + 2 * d
    return embeddings + (attention + feed_forward) * architecture.layers + d**2 + 2 * d


def by_cost(
    architectures: Sequence[Architecture], cost: Callable[[Architecture], float]
) -> tuple[Architecture, ...]:
    """The architectures from the cheapest to the dearest; equally dear ones keep their order."""
    return tuple(sorted(architectures, key=cost))


def search(losses: Sequence[float], costs: Sequence[float], limit: float) -> int:
    """Place of the least loss among the architectures that cost less than ``limit``; of equal ones the first.

    Args:
        losses: held-out loss of each architecture.
        costs: of each, in the unit of ``limit``.
        limit: not itself allowed.

    Raises:
        ConfigError: lists of another length, or nothing below the limit.
        NonFiniteError: a loss below the limit that is no number.

    Source: Xu et al., NeurIPS 2022 (arXiv 2201.12507), section 3.3.
    """
    if len(losses) != len(costs):
        raise ConfigError(f"losses has {len(losses)} entries but costs has {len(costs)}: give one of each")
    fitting = [place for place, cost in enumerate(costs) if cost < limit]
    if not fitting:
        least = f"the cheapest costs {min(costs)}" if len(costs) else "there are none"
        raise ConfigError(f"limit is {limit} but no architecture costs less ({least}): raise the limit")
    for place in fitting:
        if not math.isfinite(losses[place]):
            raise NonFiniteError(
                f"the loss of architecture {place} is {losses[place]}: nothing can be chosen"
            )
    return min(fitting, key=lambda place: losses[place])
