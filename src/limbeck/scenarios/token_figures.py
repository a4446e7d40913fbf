"""What language models say of the tokens that count, token by token, and the figures made of it."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.contracts import Batch, Outputs
from limbeck.errors import NonFiniteError
from limbeck.losses.divergences import ForwardKL, ReverseKL
from limbeck.losses.top_tokens import TopTokens, top_divergence
from limbeck.metrics import accuracy, calibration, fidelity
from limbeck.metrics.statistics import mean_interval

# What ``compared`` gives of each token, the factor and the name of its mean.
OF_TOKENS = (
    ("kl", 1, "kl"), ("reverse_kl", 1, "reverse_kl"), ("acceptance", 1, "acceptance"),
    ("top", 100, "top_overlap"),
)  # fmt: skip
CHUNK = 512  # rows whose probabilities are held at a time
Figures = dict[str, Any]


@torch.no_grad()
def told(outputs: Outputs, batch: Batch, domain: Tensor) -> dict[str, Tensor]:
    """What one network says of each token that counts, each [R]: ``nll`` in nats, ``right`` and
    ``confidence`` in the most probable token, and the token's own ``domain``, from those [B] of the rows."""
    assert batch.rows is not None
    found: dict[str, list[Tensor]] = {"nll": [], "right": [], "confidence": []}
    for shares, labels in zip(probabilities(outputs), torch.split(batch.labels, CHUNK), strict=True):
        best, guess = shares.max(1)
        found["nll"].append(-shares.gather(1, labels[:, None]).squeeze(1))
        found["right"].append((guess == labels).float())
        found["confidence"].append(best.exp())
    told = {name: torch.cat(parts).float().cpu() for name, parts in found.items()}
    return told | {"domain": domain[batch.rows.cpu() // batch.inputs.shape[1]]}


@torch.no_grad()
def compared(student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
    """How near two networks are at each token, each [R]; ``labels`` [R] are the right ones.

    ``own`` and ``other`` say who is right; ``same`` whether both find the same token most probable; ``top``
    is the share of the teacher's five most probable tokens that are among the student's five. ``kl`` is
    KL(teacher || student) and ``reverse_kl`` the other one, in nats; ``acceptance`` the sum over tokens of
    the smaller probability: how often speculative decoding would take the student's token. Of a served
    teacher all tokens that it does not tell of are one outcome: both divergences are then lower bounds, and
    there is no ``acceptance`` and no ``top``.
    """
    if teacher.top is not None:
        return _compared_to_top(student, TopTokens(*teacher.top), labels)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for own, other, right in zip(
        probabilities(student), probabilities(teacher), torch.split(labels, CHUNK), strict=True
    ):
        width = min(own.shape[1], other.shape[1])
        if own.shape != other.shape:  # one has room for tokens that the tokenizer lacks
            own, other = own[:, :width].log_softmax(1), other[:, :width].log_softmax(1)
        gap = torch.where(torch.isfinite(own) & torch.isfinite(other), other - own, 0.0)
        found["kl"].append((other.exp() * gap).sum(1))
        found["reverse_kl"].append(-(own.exp() * gap).sum(1))
        _guesses(found, own.argmax(1), other.argmax(1), right)
        found["top"].append(fidelity.top_shares(own, other))
        found["acceptance"].append(torch.minimum(own, other).exp().sum(1))
    return {name: torch.cat(parts).float().cpu() for name, parts in found.items()}


def _guesses(found: dict[str, list[Tensor]], own: Tensor, other: Tensor, right: Tensor) -> None:
    """Add what follows from the most probable tokens [r] of both."""
    found["same"].append((own == other).float())
    found["own"].append((own == right).float())
    found["other"].append((other == right).float())


def _compared_to_top(student: Outputs, teacher: TopTokens, labels: Tensor) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = defaultdict(list)
    done = 0
    for own, right in zip(probabilities(student), torch.split(labels, CHUNK), strict=True):
        part = teacher[done : done + len(own)]
        found["kl"].append(top_divergence(ForwardKL(), own, part, reduction="none"))
        found["reverse_kl"].append(top_divergence(ReverseKL(), own, part, reduction="none"))
        _guesses(found, own.argmax(1), part.ids[:, 0], right)
        done += len(own)
    return {name: torch.cat(parts).float().cpu() for name, parts in found.items()}


def probabilities(outputs: Outputs) -> Iterator[Tensor]:
    """Log-probabilities of the next token, some rows [r, V] at a time."""
    assert outputs.hidden is not None and outputs.unembedding is not None
    for hidden in torch.split(outputs.hidden, CHUNK):
        yield outputs.unembedding.logits(hidden).float().log_softmax(1)


def side(values: Mapping[str, Tensor], domains: tuple[str, ...]) -> Figures:
    """One network's figures from what ``told`` gives over all tokens of ``domains``.

    Raises:
        NonFiniteError: a token's probability is no number.
    """
    nll, right, confidence = (values[name] for name in ("nll", "right", "confidence"))
    if not torch.isfinite(nll).all():
        raise NonFiniteError("a prediction is not finite: lower scenario.optim.lr")
    hits, count = int(right.sum()), len(right)
    found: Figures = {
        "accuracy": 100 * hits / count,
        "accuracy_interval": list(accuracy.wilson(hits, count)),
        "nll": float(nll.double().mean()),
        "perplexity": perplexity(nll),
        "reliability": calibration.confidence_bins(confidence, right, 15),
        "ece": calibration.confidence_error(confidence, right),
        "trust": calibration.trust(confidence, right),
    }
    if len(domains) > 1:
        own = ((name, nll[values["domain"] == number]) for number, name in enumerate(domains))
        found["domain_perplexity"] = {name: perplexity(part) for name, part in own if len(part)}
    return found


def perplexity(nll: Tensor) -> float:
    """exp of the mean of ``nll`` [R], in nats; what no float holds is the largest."""
    return math.exp(min(float(nll.double().mean()), math.log(sys.float_info.max)))


def between(values: Mapping[str, Tensor]) -> Figures:
    """The figures of fidelity from what ``compared`` gives over all tokens; shares of tokens in percent.

    The table's rows are the student right and wrong, its columns the teacher: two that are right agree.
    """
    hits, count = int(values["same"].sum()), len(values["same"])
    own, other = (2 - values[name].double() for name in ("own", "other"))
    cells = [[float(((own == a) & (other == b)).double().mean()) for b in (1, 2)] for a in (1, 2)]
    found: Figures = {
        "agreement": 100 * hits / count,
        "agreement_interval": list(accuracy.wilson(hits, count)),
        "agreement_table": [[100 * cell for cell in row] for row in cells],
    }
    for name, factor, figure in OF_TOKENS:
        if name in values:
            mean, (low, high) = values[name].double().mean(), mean_interval(values[name].double())
            found |= {figure: factor * float(mean), f"{figure}_interval": [factor * low, factor * high]}
    return found
