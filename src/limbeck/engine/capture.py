"""Caches in use: what a frozen network says about every sample in every replayed view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from limbeck.contracts import Batch, Outputs, Unembedding
from limbeck.engine.cache import Cache, Rows
from limbeck.engine.fit import Source
from limbeck.errors import NonFiniteError

CHUNK = 256


class Replayable(Protocol):
    """Samples whose views can be asked for again.

    Attributes:
        index: positions [N] of the samples.
        batch_size: of them in a step.
        replays: number of different views of each sample; None = fresh ones in every epoch.
    """

    index: Tensor
    batch_size: int

    @property
    def replays(self) -> int | None: ...

    @property
    def count(self) -> int: ...

    @property
    def steps(self) -> int: ...

    def describe(self) -> dict[str, Any]: ...

    def in_order(self, batch_size: int) -> Self: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class Captured:
    """What ``ask`` says over all samples and views of ``batches``: asked once, then read from disk.

    Nothing is read or asked before the first call, when the network that ``ask`` stands for is ready.

    Args:
        root: folder that holds caches.
        key: gives what the rows depend on besides the pixels (weights, taps, precision).
        batches: their views must be replayed.
        ask: gives the rows [B, ...] of a batch.
        device: where batches are moved to before ``ask``.
        warn: told of a cache that was damaged, and is made anew.
        dtype: storage type of floating rows.
        size: samples that are asked for at once.
        shared: it is there for other runs too, and ``delete`` leaves it.

    Raises:
        CacheError: at a call: the cache cannot be written.
    """

    def __init__(
        self,
        root: Path,
        key: Callable[[], dict[str, Any]],
        batches: Replayable,
        ask: Callable[[Batch], Rows],
        *,
        device: torch.device,
        warn: Callable[[str], None],
        dtype: torch.dtype = torch.float32,
        size: int = CHUNK,
        shared: bool = False,
    ) -> None:
        self.root, self.key, self.batches, self.ask = root, key, batches, ask
        self.device, self.warn, self.dtype, self.size = device, warn, dtype, size
        self.shared = shared
        self.cache: Cache | None = None

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The rows of a batch, on the batch's device."""
        if self.cache is None:
            self.cache = self._fill()
        rows = self.cache(batch.index.cpu(), batch.view.cpu())
        return {name: row.to(batch.inputs.device, non_blocking=True) for name, row in rows.items()}

    def delete(self) -> None:
        """Remove what was captured, unless it is shared."""
        if self.cache is not None and not self.shared:
            self.cache.delete()

    def place(self) -> Cache:
        """The cache, as it is on disk."""
        assert self.batches.replays is not None
        key = {**self.key(), "pixels": self.batches.describe()}
        return Cache(self.root, key, self.batches.index, self.batches.replays, self.dtype)

    def _fill(self) -> Cache:
        cache, ordered = self.place(), self.batches.in_order(self.size)

        @torch.no_grad()
        def chunks(first: int) -> Iterator[Rows]:
            begin, row = divmod(first, ordered.count)
            for view in range(begin, cache.views):
                for batch in ordered.epoch(view, start=row // self.size if view == begin else 0):
                    yield self.ask(batch.to(self.device))

        cache.fill(chunks, self.warn)
        return cache


class WithQuery:
    """Batches that carry captured query features."""

    def __init__(self, source: Source, captured: Captured) -> None:
        self.source, self.captured = source, captured

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return self.source.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from step ``start`` on."""
        for batch in self.source.epoch(epoch, start):
            yield replace(batch, query=self.captured(batch)["query"])


def rows_of(outputs: Outputs, top: int | None = None) -> dict[str, torch.Tensor]:
    """A network's outputs as rows of a cache: both heads, the features, and the same of its other paths.

    Args:
        top: keep only so many of the largest logits of the class head; None = all.
    """
    rows = {"logits": outputs.logits} if top is None else shortened(outputs.logits, top)
    if outputs.soft_logits is not None:
        rows["soft"] = outputs.soft_logits
    rows |= {f"at_{tap}": value for tap, value in outputs.features.items()}
    for name, other in outputs.paths.items():
        rows |= {f"path={name}={key}": value for key, value in rows_of(other, top).items()}
    return rows


def token_rows(outputs: Outputs, batch: Batch, top: int | None = None) -> dict[str, torch.Tensor]:
    """What a language model said of a batch, [B, T, ...]: its hidden states, or its most probable tokens.

    Args:
        outputs: with ``hidden`` [R, D] and ``unembedding``, or with ``top``.
        batch: says where the R rows belong; what does not count is 0.
        top: how many tokens; None = the hidden states, from which all follows, or all tokens of ``top``.

    Raises:
        NonFiniteError: the model's answer to a row is no number.
    """
    if top is None and outputs.hidden is not None:
        found = {"hidden": outputs.hidden}
    else:
        ids, shares = _top(outputs, top)
        if not torch.isfinite(shares[:, 0]).all():
            raise NonFiniteError("the teacher's output is not finite: mend its weights, or name others")
        found = {"ids": ids.int(), "shares": shares}
    taps = {f"at_{tap}": value for tap, value in outputs.features.items()}
    return {name: _spread(values, batch) for name, values in found.items()} | taps


def _top(outputs: Outputs, count: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` most probable tokens [R, K] and their log-probabilities."""
    if outputs.top is not None:
        ids, shares = outputs.top
        return ids[:, :count], shares[:, :count]
    assert outputs.hidden is not None and outputs.unembedding is not None and count is not None
    return most_probable(outputs.hidden, outputs.unembedding, count)


def _spread(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The rows [R, ...] at their places in [B, T, ...]."""
    assert batch.rows is not None
    flat = values.new_zeros(batch.inputs.numel(), *values.shape[1:])
    return flat.index_copy_(0, batch.rows, values).reshape(*batch.inputs.shape, *values.shape[1:])


def token_outputs(rows: Rows, batch: Batch, head: Unembedding | int, *, project: bool = False) -> Outputs:
    """The inverse of ``token_rows`` for the rows of ``batch``.

    Args:
        head: the last layer of the model that was asked; of one that is served, how many tokens it has.
        project: whether logits are asked for; those of tokens that were left out share what is left.
    """
    taps = {name.removeprefix("at_"): value for name, value in rows.items() if name.startswith("at_")}
    if not isinstance(head, int) and "hidden" in rows:
        hidden = batch.counted(rows["hidden"]).to(head.weight.dtype)
        logits = head.logits(hidden) if project else hidden.new_empty(len(hidden), 0)
        return Outputs(logits=logits, hidden=hidden, unembedding=head, features=taps)
    ids, shares = batch.counted(rows["ids"]).long(), batch.counted(rows["shares"]).float()
    told = Outputs(logits=shares.new_empty(len(shares), 0), top=(ids, shares), features=taps)
    return topped(told, None, head if isinstance(head, int) else len(head.weight), project=project)


def topped(outputs: Outputs, top: int | None, width: int, *, project: bool = False) -> Outputs:
    """A language model's answer with its ``top`` most probable tokens alone, as a cache of these gives it.

    Args:
        outputs: with ``hidden`` [R, D] and ``unembedding``, or with ``top``.
        top: how many tokens; None = all of ``outputs.top``.
        width: how many tokens there are.
        project: see ``token_outputs``.
    """
    ids, shares = _top(outputs, top)
    logits = probable_logits(ids, shares, width) if project else shares.new_empty(len(shares), 0)
    return Outputs(logits=logits, top=(ids, shares), features=outputs.features)


def probable_logits(ids: torch.Tensor, shares: torch.Tensor, width: int) -> torch.Tensor:
    """Logits [R, width]: the tokens ``ids`` [R, K] have their log-probabilities ``shares``, and the others
    share what is left."""
    left = torch.log1p(-shares.exp().sum(1).clamp(max=1 - 1e-6))
    known = {"rest": left - math.log(max(width - ids.shape[1], 1)), "classes": ids, "top": shares}
    return lengthened(known, width)


@torch.no_grad()
def most_probable(
    hidden: torch.Tensor, head: Unembedding, count: int, rows: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` most probable tokens [R, K] and their log-probabilities, ``rows`` rows at a time."""
    parts = []
    for part in torch.split(hidden, rows):
        logits = head.logits(part).float()
        values, ids = largest(logits, min(count, logits.shape[1]))
        parts.append((ids, values - logits.logsumexp(1, keepdim=True)))
    return torch.cat([ids for ids, _ in parts]), torch.cat([shares for _, shares in parts])


def largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest of each row [R, V], in falling order, and their places, each [R, count].

    They lie in the ``count`` groups whose largest members are the largest: two short searches instead of a
    long one, where V is much larger than ``count``.
    """
    size = math.isqrt(values.shape[1] // max(count, 1))
    groups = values.shape[1] // max(size, 1)
    if size < 4:
        found, places = values.topk(count, dim=1)
        return found, places
    even = size * groups
    best = values[:, :even].reshape(-1, size, groups).amax(1).topk(count, dim=1, sorted=False).indices
    members = torch.arange(0, even, groups, device=values.device)
    among = (best[:, :, None] + members).flatten(1)
    rest = torch.arange(even, values.shape[1], device=values.device).expand(len(values), -1)
    among = torch.cat([among, rest], dim=1)
    found, chosen = values.gather(1, among).topk(count, dim=1)
    return found, among.gather(1, chosen)


def shortened(logits: torch.Tensor, top: int) -> dict[str, torch.Tensor]:
    """The ``top`` largest logits [B, top], their classes, and one logit [B] that stands for each of the rest.

    ``rest`` is log(mean(exp)) of what is left out: the softmax at temperature 1 keeps the probabilities of
    the largest and the mass of the rest exactly, and spreads that mass evenly.
    """
    wide = logits.float()
    values, classes = wide.topk(top, dim=1)
    rest = wide.scatter(1, classes, -torch.inf).logsumexp(1) - math.log(wide.shape[1] - top)
    return {"top": values, "classes": classes, "rest": rest}


def lengthened(rows: Rows, width: int) -> torch.Tensor:
    """The inverse of ``shortened`` for ``width`` classes, with equal logits for what was left out."""
    return rows["rest"].unsqueeze(1).repeat(1, width).scatter(1, rows["classes"], rows["top"])


def outputs_of(rows: Rows, width: int = 0) -> Outputs:
    """The inverse of ``rows_of``; ``width`` is the number of classes of logits that were shortened."""
    features = {name.removeprefix("at_"): value for name, value in rows.items() if name.startswith("at_")}
    paths: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in rows.items():
        if name.startswith("path="):
            path, _, key = name.removeprefix("path=").partition("=")
            paths.setdefault(path, {})[key] = value
    return Outputs(
        logits=rows["logits"] if "logits" in rows else lengthened(rows, width),
        soft_logits=rows.get("soft"),
        features=features,
        paths={path: outputs_of(own, width) for path, own in paths.items()},
    )
