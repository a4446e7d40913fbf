"""A teacher that tells subclasses apart by linear projections of its last embedding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Net, Outputs, Spec, Teacher
from limbeck.errors import ConfigError
from limbeck.nets.wrapped import Wrapped, embed, last_linear

FLAT = 1e-3  # a spread below this share of the embeddings' size tells nothing but rounding


@dataclass(frozen=True, kw_only=True)
class LELPTeacher(Teacher):
    """Any teacher with a linear classifier, whose classes are split by where its embedding lies within them.

    Before it teaches, it looks once at the student's training samples: for each class it takes the mean of
    the embeddings and a few directions. ``logits`` stay the teacher's; ``soft_logits`` [B, C * S] are the
    log-probabilities of the subclasses, class by class. Where a label may not be read, its own guess stands
    for it.

    Attributes:
        observes: it does.
        teacher: who teaches.
        subclasses: S, for each class.
        beta_scale: the subclass temperature as a share of the spread of the positions along all directions
            over the training samples, > 0.
        directions: ``principal`` components of a class; ``random`` ones; the means of ``kmeans``, each sample
            belonging the more to one the nearer it is; or by ``chance``: positions drawn for each sample
            without looking at it, the control for what more outputs alone do.
        null_space: take from the embedding what the classifier reads, since the classes tell that already.
        rotation: mix the principal directions of a class by a random rotation, so that they share the
            variance.

    Raises:
        ConfigError: a field out of its range.

    Source: Loo, Iliopoulos, Hu, Vee 2024 (arXiv 2409.20449), sections 3.1 to 3.3.
    Differs: the temperature relative to the spread; centring by the class mean, the same for every sample.
    """

    observes: ClassVar[bool] = True

    teacher: Teacher
    subclasses: int = 5
    beta_scale: float = 0.1
    directions: Literal["principal", "random", "kmeans", "chance"] = "principal"
    null_space: bool = True
    rotation: bool = True

    def __post_init__(self) -> None:
        if self.subclasses < 1:
            raise ConfigError(f"subclasses is {self.subclasses}: allowed are values of at least 1")
        if not 0 < self.beta_scale < float("inf"):
            raise ConfigError(f"beta_scale is {self.beta_scale}: allowed are finite values above 0")

    @property
    def learns(self) -> bool:  # type: ignore[override]  # that of the teacher inside
        """Whether the teacher is trained on labels before it teaches."""
        return self.teacher.learns

    def lessons(self) -> Any:
        """See ``Teacher.lessons``."""
        return self.teacher.lessons()

    def input_spec(self) -> Any:
        """See ``Network.input_spec``."""
        return self.teacher.input_spec()

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``.

        Raises:
            ConfigError: more subclasses than the embedding has directions that the classifier does not read.
        """
        return Projected(self, self.teacher.build(spec, generator), spec.classes, generator)


class Projected(Wrapped):
    """A network and what it found out about its embeddings, in buffers."""

    projector: Tensor
    mean: Tensor
    rows: Tensor
    offset: Tensor
    beta: Tensor
    mixing: Tensor
    start: Tensor

    def __init__(self, choice: LELPTeacher, inner: Net, classes: int, generator: torch.Generator) -> None:
        super().__init__(inner)
        self.choice, self.classes = choice, classes
        self._head = (last_linear(inner, classes),)  # in a tuple: it is registered within
        width, count = self._head[0].in_features, choice.subclasses
        free = width - classes * choice.null_space
        if free < count:
            raise ConfigError(
                f"subclasses is {count} but the embedding has only {free} directions of {width} that the "
                f"classifier does not read: use at most {free}, or null_space: false"
            )
        shape = (classes, count, width)
        self.register_buffer("mixing", rotations(classes, count, generator), persistent=False)
        self.register_buffer("start", torch.randn(shape, generator=generator), persistent=False)
        self.register_buffer("projector", torch.eye(width))
        self.register_buffer("mean", torch.zeros(classes, width))
        self.register_buffer("rows", torch.zeros(shape))
        self.register_buffer("offset", torch.zeros(classes, count))
        self.register_buffer("beta", torch.ones(()))

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """The inner outputs; in evaluation mode with the subclasses' log-probabilities."""
        if self.training:
            out: Outputs = self.inner(batch, taps, teacher)
            return out
        out, feature = embed(self.inner, self._head[0], batch, taps, teacher)
        scores = self._positions(feature, batch.index) / self.beta
        return replace(out, soft_logits=losses.subclass_log_probs(out.logits, scores).flatten(1))

    def observe(self, batches: Iterable[Batch]) -> None:
        """Find mean, directions and spread of each class; see ``Net.observe``.

        Raises:
            DataError: a class has too few samples.
        """
        found = [self._look(batch) for batch in batches]
        features, labels, index = (torch.cat(parts) for parts in zip(*found, strict=True))
        weight = self._head[0].weight.detach().double()
        if self.choice.null_space:
            self.projector.copy_(losses.null_projector(weight))
        mean, rows, offset = self._directions(features.double() @ self.projector.double().mT, labels)
        for buffer, value in ((self.mean, mean), (self.rows, rows), (self.offset, offset)):
            buffer.copy_(value)
        spread = (
            self._positions(features, index).std().clamp(min=FLAT * float(features.square().mean().sqrt()))
        )
        self.beta.copy_(self.choice.beta_scale * spread)

    def _look(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        out, feature = embed(self.inner, self._head[0], batch, (), None)
        guess = out.logits.argmax(1)
        known = batch.labels if batch.labelled is None else torch.where(batch.labelled, batch.labels, guess)
        return feature.float(), known, batch.index

    def _directions(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means [C, D], directions [C, S, D], and what is taken from positions along them [C, S]."""
        choice = self.choice
        mean, rows = losses.class_directions(features, labels, self.classes, choice.subclasses)
        offset = rows.new_zeros(rows.shape[:2])
        if choice.directions == "random":
            drawn = self.start.to(rows) @ self.projector.to(rows).mT
            rows = torch.linalg.qr(drawn.mT).Q.mT
        if choice.directions == "kmeans":
            rows = torch.stack(
                [centres(features[labels == k] - mean[k], choice.subclasses) for k in range(self.classes)]
            )
            offset = rows.square().sum(-1) / 2  # positions are then minus half the squared distance, but for
            # what all subclasses have in common
        elif choice.rotation:
            rows = self.mixing.to(rows) @ rows
        return mean, rows, offset

    def _positions(self, features: Tensor, index: Tensor) -> Tensor:
        """Positions [B, C, S] of embeddings [B, D]."""
        if self.choice.directions == "chance":
            return drawn_by(index, self.rows.shape[:2], features.dtype)
        return losses.positions(features, self.projector, self.mean, self.rows) - self.offset


def rotations(classes: int, count: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal matrices [classes, count, count]."""
    q, r = torch.linalg.qr(torch.randn(classes, count, count, generator=generator))
    found: Tensor = q * torch.diagonal(r, dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return found


def centres(features: Tensor, count: int) -> Tensor:
    """Means [count, D] of the clusters that k-means finds in ``features`` [n, D]."""
    from sklearn.cluster import KMeans

    found = KMeans(count, n_init=10, random_state=0).fit(features.cpu().numpy())
    means: Tensor = torch.from_numpy(found.cluster_centers_).to(features)
    return means


def drawn_by(index: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1), [B, *shape], that are a function of each sample's position alone: a hash."""
    cells = torch.arange(shape.numel(), device=index.device).reshape(shape)
    bits = index.reshape(-1, *(1,) * len(shape)) * shape.numel() + cells + 1
    for shift, factor in ((16, 0x45D9F3B), (15, 0x119DE1F3), (16, 1)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return (bits.double() / 2**32).to(dtype)
