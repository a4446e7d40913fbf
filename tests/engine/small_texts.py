"""Whole runs of a second on texts: two tiny transformers that learn products, digit by digit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from limbeck import config, plain
from limbeck.config import Recipe
from limbeck.contracts import Spec
from limbeck.data.python_texts import sums
from limbeck.data.tokenizers import characters, special_of
from limbeck.nets.causal_lm import CausalLM
from limbeck.students.llama import LlamaStudent

ROOM = 3  # tokens that the teacher has beyond its tokenizer's


@functools.cache
def tokenizer() -> Any:
    """The characters of the products."""
    return characters(sums())


def model(folder: Path, name: str = "teacher", *, room: int = ROOM, **fields: Any) -> str:
    """A folder with a random language model and its tokenizer."""
    place = folder / name
    if not place.exists():
        spec = Spec(classes=len(tokenizer()) + room, size=64, special=special_of(tokenizer()))
        choice = LlamaStudent(**{"layers": 2, "width": 16, "heads": 2, **fields})
        net: Any = choice.build(spec, torch.Generator().manual_seed(len(name)))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1 + 4 * (parameter.ndim == 2))
        assert isinstance(net, CausalLM)
        net.tokenizer = tokenizer()
        net.save(place)
    return str(place)


def given(folder: Path, *sets: str) -> dict[str, Any]:
    """A small recipe as plain data: some 20 steps in two epochs."""
    asked: dict[str, Any] = {
        "name": "small-texts",
        "teacher": {"name": "causal_lm", "model": model(folder)},
        "student": {"name": "llama", "layers": 1, "width": 8, "heads": 2},
        "objective": [{"name": "labels"}, {"name": "divergence"}],
        "scenario": {"name": "language", "epochs": 2, "batch_size": 8, "optim": {"lr": 0.01}},
        "data": {
            "name": "python_texts",
            "domains": ["sums"],
            "shares": [0.08],
            "length": 24,
            "tokenizer": None,
        },
        "engine": {"threads": 1, "checkpoint_seconds": 1000, "reuse_teachers": False, "log_every": 2},
    }
    for item in sets:
        asked = plain.override(asked, item)
    return asked


def recipe(folder: Path, *sets: str) -> Recipe:
    """The same, checked."""
    return config.build(given(folder, *sets))
