"""All randomness of a run comes from its seed and the name of what needs it."""

from __future__ import annotations

import hashlib
import json

import torch


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed from ``seed`` and ``names``: the same ones give the same number."""
    text = json.dumps([seed, *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A fresh generator for what ``names`` name."""
    return torch.Generator().manual_seed(derive(seed, *names))
