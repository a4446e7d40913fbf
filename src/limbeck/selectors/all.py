"""Every sample counts alike."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.contracts import Selector


@dataclass(frozen=True, kw_only=True)
class All(Selector):
    """Every sample is seen in every epoch and counts alike."""
