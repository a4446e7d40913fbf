"""What the objectives over tokens share."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.contracts import Outputs
from limbeck.engine.capture import most_probable
from limbeck.errors import ConfigError
from limbeck.losses.chunked import Hidden
from limbeck.losses.top_tokens import TopTokens


def hidden_of(outputs: Outputs) -> Hidden:
    """What a language model's last layer reads, and that layer.

    Raises:
        ConfigError: the network is no language model.
    """
    if outputs.hidden is None or outputs.unembedding is None:
        raise ConfigError(
            "this objective matches what language models say of the next token, but a network here is none: "
            "take language models, or the objective kd"
        )
    return Hidden(outputs.hidden, outputs.unembedding)


def taught(outputs: Outputs) -> Hidden | TopTokens:
    """The teacher's side: its hidden states, or its most probable tokens where it was asked before."""
    return hidden_of(outputs) if outputs.top is None else TopTokens(*outputs.top)


def shared_vocabulary(student: Outputs, teacher: Outputs) -> int | None:
    """How many tokens both networks have, where one has more than the other; None = both have as many."""
    if student.unembedding is None or teacher.unembedding is None:
        return None
    own, other = len(student.unembedding.weight), len(teacher.unembedding.weight)
    return None if own == other else min(own, other)


def top_of(outputs: Outputs, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` most probable tokens [R, K] and their log-probabilities [R, K], the most probable first.

    Raises:
        ConfigError: the teacher was asked for fewer, or is no language model.
    """
    if outputs.top is None:
        network = hidden_of(outputs)
        with torch.no_grad():
            return most_probable(network.states, network.unembedding, count)
    ids, log_probs = outputs.top
    if ids.shape[1] < count:
        raise ConfigError(
            f"k is {count} but only {ids.shape[1]} tokens of the teacher are kept: set engine.cache_top_k to "
            f"{count} or more"
        )
    return ids[:, :count], log_probs[:, :count]
