"""A mixture of domains whose shares change from interval to interval, drawn so that it can be resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from limbeck.data import chance
from limbeck.errors import CheckpointError, ConfigError, DataError

Numbers = npt.NDArray[np.int64]

_DOMAIN, _SHUFFLE = 201, 202  # purposes of the draws


def cyclic_indices(draws: Numbers, sizes: Sequence[int], used: Sequence[int] | None = None) -> Numbers:
    """The item that each draw takes: the next unused one of its domain, and the first again after the last.

    Args:
        draws: the domain [n] of each draw.
        sizes: items of each domain, >= 1.
        used: items that each domain has given before; None = none.

    Returns:
        [n] positions within their domains.

    Raises:
        DataError: a domain is drawn that has no items, or that there is not.

    Source: DDK (arXiv 2407.16154), section 3.2.
    """
    place = np.empty(len(draws), np.int64)
    for domain in np.unique(draws):
        if not 0 <= domain < len(sizes) or sizes[domain] < 1:
            raise DataError(f"domain {domain} is drawn but has no items: draw only from domains with data")
        own = draws == domain
        start = 0 if used is None else used[domain]
        place[own] = (start + np.arange(own.sum())) % sizes[domain]
    return place


class DomainSampler:
    """Draws the samples of an interval: a domain by its share, then that domain's next unused item.

    What an interval draws depends on the seed, the shares, the number of the interval and on how much of
    each domain went before; so two numbers a domain are all that a checkpoint needs.

    Attributes:
        sizes: items of each domain.
        seed: fixes the draws.
        used: items that each domain has given so far.
        interval: number of the next interval, from 0.
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        """A sampler that has drawn nothing yet.

        Args:
            sizes: items of each domain, >= 1.
            seed: fixes the draws.

        Raises:
            DataError: no domain, or one without items.
        """
        if not len(sizes) or min(sizes) < 1:
            raise DataError(
                f"the domains have {list(sizes)} items: give at least one domain, and one item in each"
            )
        self.sizes, self.seed = tuple(int(size) for size in sizes), seed
        self.used, self.interval = [0] * len(sizes), 0

    def draw(self, shares: Sequence[float], count: int) -> tuple[Numbers, Numbers]:
        """The samples of the next interval, shuffled.

        Args:
            shares: chance of each domain, >= 0; they sum to 1.
            count: how many samples.

        Returns:
            (domain [count], position within it [count]).

        Raises:
            ConfigError: shares that are no distribution over the domains.
        """
        edges = np.cumsum(_distribution(shares, len(self.sizes)))
        place = np.arange(count)
        chances = chance.uniform(self.seed, _DOMAIN, self.interval, place)
        draws = np.searchsorted(edges / edges[-1], chances, side="right").astype(np.int64)
        items = cyclic_indices(draws, self.sizes, self.used)
        for domain, drawn in enumerate(np.bincount(draws, minlength=len(self.sizes)).tolist()):
            self.used[domain] += drawn
        order = chance.order(count, self.seed, _SHUFFLE, self.interval)
        self.interval += 1
        return draws[order], items[order]

    def state(self) -> dict[str, Any]:
        """Plain data from which ``restore`` goes on."""
        return {
            "sizes": list(self.sizes),
            "seed": self.seed,
            "used": list(self.used),
            "interval": self.interval,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave.

        Raises:
            CheckpointError: it belongs to other domains or to another seed.
        """
        for name, own in (("sizes", list(self.sizes)), ("seed", self.seed)):
            if state[name] != own:
                raise CheckpointError(
                    f"the domain sampler's {name} is {own} but {state[name]} in the checkpoint: resume with "
                    "the data and the seed of that run"
                )
        self.used, self.interval = [int(n) for n in state["used"]], int(state["interval"])


def _distribution(shares: Sequence[float], count: int) -> npt.NDArray[np.float64]:
    values = np.asarray(shares, dtype=np.float64)
    if values.shape != (count,) or not (values >= 0).all() or not math.isclose(values.sum(), 1, abs_tol=1e-6):
        raise ConfigError(f"shares are {values.tolist()}: give {count} numbers from 0 that sum to 1")
    return values
