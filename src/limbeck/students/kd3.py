"""A student that answers through its teacher's classifier."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Outputs, Spec, Student
from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.backbones import InputSpec, seeded
from limbeck.nets.taps import resolve

PROJECTED, POOLED = "projected", "pooled"


@dataclass(frozen=True, kw_only=True)
class KD3Student(Student):
    """Any student whose features a projector brings to the teacher's, and whose classifier is the teacher's.

    The logits are W_t(pool(projector(f_s))), with W_t the teacher's frozen classifier, of which the finished
    student holds a copy. The student's own classifier is taken out. Besides its network's own taps it gives
    ``projected``, the map in the teacher's width [B, c_t, h, w], and ``pooled``, its own pooled feature.

    Attributes:
        network: the student.
        tap: module path of its last feature map.
        classifier: module path of its own classifier.
        teacher_tap: module path of the teacher's last feature map.
        teacher_classifier: module path of the teacher's classifier, which reads that map's mean over pixels.
        factor: the projector is c_t / factor wide inside.

    Raises:
        ConfigError: a factor below 1.
        ShapeError: a module path that is not there, or a feature that is no map.

    Source: Tang et al., ICCV 2023 (arXiv 2307.11469), official code.
    """

    network: Student
    tap: str = "stages.-1"
    classifier: str = "head"
    teacher_tap: str = "stages.-1"
    teacher_classifier: str = "head"
    factor: int = 2

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"factor is {self.factor}: allowed are values of at least 1")

    def input_spec(self) -> InputSpec:
        """See ``Network.input_spec``."""
        form: InputSpec = self.network.input_spec()
        return form

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``."""
        body = self.network.build(spec, generator)
        inner = _inner(body)
        inner.set_submodule(resolve(inner, self.classifier), nn.Identity())
        return KD3Net(self, body, spec, int(torch.randint(2**31, (), generator=generator)))


class KD3Net(Net):
    """``KD3Student`` at work; it answers once a teacher is attached.

    While it learns it reads the classifier of the teacher itself, which may yet be trained when it is
    attached; when it has learnt it keeps a copy.
    """

    keeps_teacher = True

    def __init__(self, choice: KD3Student, body: Net, spec: Spec, seed: int) -> None:
        super().__init__()
        self.choice, self.spec, self.seed = choice, spec, seed
        self.body = body
        self.projector: nn.Module | None = None
        self.classifier: nn.Module | None = None
        self.size: tuple[int, int] = (0, 0)
        self._teacher: tuple[nn.Module, ...] = ()  # unregistered: it is the teacher's
        self.settled: Tensor
        self.register_buffer("settled", torch.tensor(False))
        self.register_load_state_dict_post_hook(type(self)._leave)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def attach_teacher(self, teacher: Net) -> None:
        """Build the projector to the teacher's width, and take over its classifier."""
        choice, spec = self.choice, self.spec
        place = next(self.body.parameters()).device
        zeros = torch.zeros(2, spec.channels, spec.size, spec.size, device=place)
        index = torch.zeros(2, dtype=torch.int64, device=place)
        blank = Batch(inputs=zeros, labels=index, index=index, view=index)
        own, other = self.body.training, teacher.training
        mine = _map("student", self.body.eval()(blank, taps=(choice.tap,)).features[choice.tap])
        theirs = _map(
            "teacher", teacher.eval()(blank, taps=(choice.teacher_tap,)).features[choice.teacher_tap]
        )
        self.body.train(own)
        teacher.train(other)
        inner = _inner(teacher)
        source = inner.get_submodule(resolve(inner, choice.teacher_classifier))
        self.size = min(mine.shape[2], theirs.shape[2]), min(mine.shape[3], theirs.shape[3])
        self.classifier = copy.deepcopy(source).requires_grad_(False)
        with seeded(torch.Generator().manual_seed(self.seed)):
            self.projector = projector(mine.shape[1], theirs.shape[1], choice.factor).to(place)
        self._teacher = (source,)

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """Logits through the teacher's classifier, and the tapped features.

        Raises:
            ConfigError: no teacher was attached.
        """
        if self.projector is None or self.classifier is None:
            raise ConfigError("student kd3 answers through its teacher's classifier: name a teacher")
        tap = self.choice.tap
        inner = tuple(dict.fromkeys([tap, *(t for t in taps if t not in (PROJECTED, POOLED))]))
        said = self.body(batch, inner, teacher)
        projected = self.projector(F.adaptive_avg_pool2d(_map("student", said.features[tap]), self.size))
        classify = self._teacher[0] if self._teacher else self.classifier
        logits = classify(projected.mean((2, 3)))
        return Outputs(logits, features={**said.features, PROJECTED: projected, POOLED: said.logits})

    def finish_task(self) -> None:
        """Keep the teacher's classifier as it is now."""
        if self._teacher and self.classifier is not None:
            self.classifier.load_state_dict(self._teacher[0].state_dict())
            self.settled.fill_(True)
            self._leave()

    def _leave(self, _loaded: object = None) -> None:
        """What has learnt needs its teacher no more, nor does one that is loaded as such."""
        if self.settled:
            self._teacher = ()


def projector(own: int, other: int, factor: int = 2) -> nn.Sequential:
    """1 x 1, 3 x 3 and 1 x 1 convolutions from ``own`` to ``other`` channels, with batch norm and ReLU."""
    inside = max(1, other // factor)
    return nn.Sequential(*_step(own, inside, 1), *_step(inside, inside, 3), *_step(inside, other, 1))


def _step(a: int, b: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]


def _map(who: str, feature: Tensor) -> Tensor:
    """A map [B, c, h, w]; a vector [B, c] counts as one of 1 x 1."""
    if feature.ndim not in (2, 4):
        raise ShapeError(
            f"the {who}'s feature is {list(feature.shape)}: kd3 needs a map [B, c, h, w] or a vector [B, c]"
        )
    return feature[:, :, None, None] if feature.ndim == 2 else feature


def _inner(net: Net) -> nn.Module:
    """The network itself, within what taps or freezes it."""
    inner: nn.Module = net
    while isinstance(found := getattr(inner, "network", None), nn.Module):
        inner = found
    return inner
