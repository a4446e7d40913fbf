"""A data set with less in it: few samples, wrong labels, rare classes, merged classes, missing labels."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.data.images import Dataset, ImageSet, Pixels, Positions, Splits, stratified
from limbeck.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Part(Dataset):
    """Another data set whose training split is cut, spoilt or merged; its test split is only merged.

    What is asked for happens in the order of the fields. All draws come from ``seed``.

    Attributes:
        data: the other data set.
        groups: classes to merge, each group one new class; classes that no group names are left out, of the
            test split too. None = the classes as they are.
        per_class: training samples to keep of each class, drawn at random; None = all.
        imbalance: long tail: class k of C keeps ``imbalance ** (-k / (C - 1))`` of its samples, at least 1.
            1 = no tail.
        trusted: share of each class's training samples whose label is left alone by ``noise``, in [0, 1). A
            scenario that holds samples out takes them from these.
        noise: share of the other training labels that become another class, drawn evenly, in [0, 1).
        labelled: training samples of each class whose label may be read; the rest goes without. None = all.
        seed: of the draws; None = the run's.

    Raises:
        ConfigError: a field out of its range, or a class that is not there.
    """

    data: Any
    groups: tuple[tuple[int, ...], ...] | None = None
    per_class: int | None = None
    imbalance: float = 1.0
    trusted: float = 0.0
    noise: float = 0.0
    labelled: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("per_class", "labelled"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: allowed are values of at least 1, or null for all")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: allowed are whole numbers from 0, or null for the run's")
        if not 1 <= self.imbalance < math.inf:
            raise ConfigError(f"imbalance is {self.imbalance}: allowed are values of at least 1")
        for name in ("trusted", "noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are shares from 0 to below 1")
        named = [c for group in self.groups or () for c in group]
        if self.groups is not None and (len(self.groups) < 2 or len(set(named)) < len(named)):
            raise ConfigError("groups must be at least two, and name no class twice")

    def seeded(self, seed: int) -> Part:
        """With the run's seed where none is set."""
        return replace(self, data=self.data.seeded(seed), seed=seed if self.seed is None else self.seed)

    def load(self) -> Splits:
        """Both splits; see ``Dataset.load``."""
        whole: Splits = self.data.load()
        train, test = self._merged(whole.train), self._merged(whole.test)
        draws = np.random.default_rng([self.seed or 0, 211])
        train = _taken(train, self._kept(train.labels, len(train.classes), draws))
        trusted = self._trusted(train.labels)
        labels = self._spoilt(train.labels, len(train.classes), trusted, draws)
        train = replace(
            train, labels=labels, labelled=self._known(labels, train.labelled, draws),
            name=self._name(train.name), trusted=self._still_trusted(train.trusted, trusted),
            noisy=_either(train.noisy, labels != train.labels) if self.noise else train.noisy,
            fingerprint=_fingerprint(train, self),
        )  # fmt: skip
        return Splits(train, test)

    def _merged(self, images: ImageSet) -> ImageSet:
        if self.groups is None:
            return images
        to = torch.full((len(images.classes),), -1)
        for new, group in enumerate(self.groups):
            for old in group:
                if not 0 <= old < len(to):
                    raise ConfigError(f"groups name class {old} but {images.name} has 0..{len(to) - 1}")
                to[old] = new
        names = tuple("+".join(images.classes[c] for c in group) for group in self.groups)
        kept = (to[images.labels] >= 0).nonzero().flatten()
        mark = hashlib.sha256(f"{images.fingerprint} {self.groups}".encode()).hexdigest()
        images = _taken(images, kept)
        return replace(images, labels=to[images.labels], classes=names, fingerprint=mark)

    def _kept(self, labels: Tensor, classes: int, draws: np.random.Generator) -> Tensor:
        """Positions that stay, sorted."""
        parts = []
        for k in range(classes):
            mine = (labels == k).nonzero().flatten()
            count = len(mine) if self.per_class is None else self.per_class
            if count > len(mine):
                raise DataError(f"per_class is {count} but class {k} has {len(mine)} samples: use fewer")
            count = max(1, round(count * self.imbalance ** (-k / max(classes - 1, 1))))
            parts.append(mine[torch.from_numpy(np.sort(draws.permutation(len(mine))[:count]))])
        return torch.cat(parts).sort().values

    def _trusted(self, labels: Tensor) -> Tensor:
        marks = torch.zeros(len(labels), dtype=torch.bool)
        if self.trusted:
            marks[stratified(labels, self.trusted, (self.seed or 0) % 2**32)[1]] = True
        return marks

    def _spoilt(self, labels: Tensor, classes: int, trusted: Tensor, draws: np.random.Generator) -> Tensor:
        others = (~trusted).nonzero().flatten().numpy()
        wrong = torch.from_numpy(draws.permutation(others)[: round(self.noise * len(others))])
        shift = torch.from_numpy(draws.integers(1, max(classes, 2), len(wrong)))  # one class has no other
        labels = labels.clone()
        labels[wrong] = (labels[wrong] + shift) % classes
        return labels

    def _still_trusted(self, before: Tensor | None, own: Tensor) -> Tensor | None:
        """Which labels are right, where the other data set trusts those ``before`` and this one ``own``."""
        if self.trusted:
            return own if before is None else own & before
        return None if self.noise else before

    def _known(self, labels: Tensor, before: Tensor | None, draws: np.random.Generator) -> Tensor | None:
        """Which labels may be read, of those that might be read ``before``."""
        if self.labelled is None:
            return before
        known = torch.zeros(len(labels), dtype=torch.bool)
        readable = torch.ones_like(known) if before is None else before
        for k in sorted(set(labels.tolist())):
            mine = ((labels == k) & readable).nonzero().flatten()
            known[mine[torch.from_numpy(draws.permutation(len(mine))[: self.labelled])]] = True
        return known

    def _name(self, name: str) -> str:
        words = [
            f"{self.per_class} per class" if self.per_class is not None else "",
            f"imbalance {self.imbalance:g}" if self.imbalance > 1 else "",
            f"{self.noise:.0%} wrong labels" if self.noise else "",
            f"{self.trusted:.0%} trusted" if self.trusted else "",
            f"{self.labelled} labelled per class" if self.labelled is not None else "",
            f"{len(self.groups)} groups" if self.groups is not None else "",
        ]
        said = ", ".join(word for word in words if word)
        return f"{name.removesuffix(' train')} ({said}) train" if said else name


@dataclass(frozen=True)
class Rows:
    """Some images of a lazy source."""

    images: ImageSet
    positions: Positions

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, H, W, C)."""
        height, width, channels = self.images.images.shape[1:]
        return len(self.positions), height, width, channels

    def read(self, positions: Positions) -> Pixels:
        """The images at ``positions`` among these rows."""
        return self.images.read(self.positions[positions])


def _rows(images: ImageSet, kept: Tensor) -> Any:
    return Rows(images, kept.numpy()) if images.lazy else images.read(kept.numpy())


def _taken(images: ImageSet, kept: Tensor) -> ImageSet:
    if len(kept) == len(images):
        return images
    noisy, labelled, trusted = (
        None if mark is None else mark[kept] for mark in (images.noisy, images.labelled, images.trusted)
    )
    return replace(
        images, images=_rows(images, kept), labels=images.labels[kept], noisy=noisy, labelled=labelled,
        trusted=trusted,
    )  # fmt: skip


def _either(some: Tensor | None, others: Tensor) -> Tensor:
    return others if some is None else some | others


def _fingerprint(images: ImageSet, part: Part) -> str:
    asked = (part.per_class, part.imbalance, part.trusted, part.noise, part.labelled, part.seed)
    return hashlib.sha256(f"{images.fingerprint} {asked}".encode()).hexdigest()
