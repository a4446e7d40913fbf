"""Data pruning: a fixed part of the data, chosen by how hard its samples are, or at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.contracts import Batch, Course, Net, Outputs, Progress, Selection, Selector
from limbeck.errors import ConfigError
from limbeck.metrics.pruning import Mode, el2n, forgetting, grand_last_layer, keep_indices

Score = Literal["el2n", "grand", "forgetting"]


@dataclass(frozen=True, kw_only=True)
class Pruned(Selector):
    """Trains on a part of the data that is chosen once, by scores of an early training, or at random.

    Scores come from fresh students that learn the labels for a few epochs, so that the hard samples still
    differ from the easy ones. With ``alpha`` the terms are weighed against each other: those that listen to
    the teacher by alpha, the others by 1 - alpha, on top of the objectives' own weights.

    A teacher that learns in the run sees all samples. In scenario ``static`` ``equal_steps`` keeps the number
    of steps, so that what is seen is not a shorter training.

    Attributes:
        fraction: share f of the samples that is kept, in (0, 1].
        mode: ``random``, ``hard`` (the largest scores), ``easy`` (the smallest) or ``moderate`` (those
            nearest to the median).
        score: ``el2n``, ``grand`` (of the last layer) or ``forgetting``; not asked for where mode is random.
        balanced: keep that share of each class; else a class may be lost, which is warned of.
        probes: early trainings, each from other weights, that a score is the mean of.
        probe_epochs: epochs of each; 3 to 20.
        tap: module path whose output the last layer reads; ``grand`` needs it.
        alpha: weight of the teacher in [0, 1]; ``rule`` = by the fraction; None = the objectives' weights
            alone.
        seed: of the random choice; None = the run's.

    Raises:
        ConfigError: a field out of its range.

    Source: Ben-Baruch et al., ICML 2025 (arXiv 2403.07854); EL2N and GraNd: Paul et al., NeurIPS 2021;
    forgetting: Toneva et al., ICLR 2019; the paper's trend of alpha as a rule: ``alpha_rule``.
    """

    fraction: float = 0.5
    mode: Mode = "random"
    score: Score = "el2n"
    balanced: bool = False
    probes: int = 3
    probe_epochs: int = 5
    tap: str | None = None
    alpha: float | Literal["rule"] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}: allowed are shares above 0, up to 1")
        for name in ("probes", "probe_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least 1")
        if isinstance(self.alpha, float | int) and not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}: allowed are weights from 0 to 1, rule, or null")
        if self.score == "grand" and self.mode != "random" and self.tap is None:
            raise ConfigError(
                "score grand reads what the last layer reads: set tap, such as hidden.-1 or pool"
            )

    def prepare(self, course: Course) -> Selection:
        """Score the samples, where the mode asks for it, and choose."""
        return Kept(self, course)

    @property
    def share(self) -> float | None:
        """Alpha as a number; None where the objectives' weights stand."""
        return alpha_rule(self.fraction) if self.alpha == "rule" else self.alpha


def alpha_rule(fraction: float) -> float:
    """Weight of the teacher by the fraction kept: 1 up to 0.1, 0.8 at 0.3, 0.5 from 0.7 on, linear between.

    Source: the trend that Ben-Baruch et al. (ICML 2025) report; the points between are a guess.
    """
    if fraction <= 0.1:
        return 1.0
    if fraction <= 0.3:
        return 1.0 - (fraction - 0.1)
    return max(0.5, 0.8 - 0.75 * (fraction - 0.3))


class Kept(Selection):
    """``Pruned`` with the samples that it chose.

    Attributes:
        kept: their positions in the data, sorted.
    """

    def __init__(self, selector: Pruned, course: Course) -> None:
        super().__init__(selector)
        self.choice, self.course = selector, course
        self.factors = self._factors(course)
        index = course.index
        labels = course.labels[index] if selector.balanced else None
        chosen = keep_indices(self._scores(), selector.fraction, selector.mode, labels, self._draws())
        self.kept = index[chosen]
        known = set(course.labels[index].tolist())
        self.lost = sorted(known - set(course.labels[self.kept].tolist()))
        if self.lost:
            named = ", ".join(map(str, self.lost))
            course.warn(f"pruning left no sample of class {named}: set balanced to keep some of each")

    def weights(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
    ) -> Mapping[str, Tensor] | None:
        """Alpha for the objectives that listen to the teacher, 1 - alpha for the others."""
        if self.factors is None:
            return None
        ones = torch.ones_like(batch.index, dtype=torch.float32)
        return {name: factor * ones for name, factor in self.factors.items()}

    def indices(self, index: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        """The same part in every epoch."""
        return index if len(self.kept) == len(index) else self.kept

    def facts(self) -> dict[str, Any]:
        """All that is needed to make the same choice again."""
        choice = self.choice
        scored = choice.mode != "random"
        return {
            "mode": choice.mode, "fraction": choice.fraction, "balanced": choice.balanced,
            "score": choice.score if scored else None,
            "probes": {"number": choice.probes, "epochs": choice.probe_epochs} if scored else None,
            "seed": "the run's" if choice.seed is None else choice.seed, "alpha": choice.share,
            "samples": len(self.kept), "classes_lost": self.lost, "indices": self.kept.tolist(),
        }  # fmt: skip

    def _factors(self, course: Course) -> dict[str, float] | None:
        alpha = self.choice.share
        if alpha is None:
            return None
        needs = {name: objective.needs() for name, objective in course.objectives.items()}
        soft = {name for name, need in needs.items() if need.teacher_logits or need.teacher}
        if alpha > 0 and not soft:
            raise ConfigError(
                f"selector.alpha is {alpha:g} but no objective listens to a teacher: add kd, or set it to 0"
            )
        if alpha == 0 and soft:
            course.warn("alpha is 0: the teacher is asked in vain; teacher none and labels alone ask nobody")
        return {name: alpha if name in soft else 1 - alpha for name in needs}

    def _draws(self) -> torch.Generator:
        seed = self.choice.seed
        return self.course.generator("pruned") if seed is None else torch.Generator().manual_seed(seed)

    def _scores(self) -> Tensor:
        """Scores [n] of ``course.index``, higher = harder; a random choice needs none."""
        course, choice = self.course, self.choice
        if choice.mode == "random":
            return torch.zeros(len(course.index))
        found = [self._probe(number) for number in range(choice.probes)]
        return torch.tensor(found, dtype=torch.float64).mean(0)

    def _probe(self, number: int) -> list[float]:
        """The scores that one early training gives."""
        course, choice = self.course, self.choice
        labels = course.labels[course.index]
        right: list[list[int]] = []

        def look(net: Net, epoch: int) -> None:
            """Which samples the probe gets right at the end of an epoch."""

            def compute() -> list[int]:
                return (self._said(net)[0].argmax(1) == labels).int().tolist()

            right.append(course.once(f"pruned-{number}-right-{epoch}", compute))

        after = look if choice.score == "forgetting" else None
        net = course.probe(f"pruned-{number}", choice.probe_epochs, after=after)

        def score() -> list[float]:
            if choice.score == "forgetting":
                return [float(count) for count in forgetting(torch.tensor(right))]
            probs, features = self._said(net)
            if features is None:
                return [float(value) for value in el2n(probs[None], labels)]
            return [float(value) for value in grand_last_layer(probs[None], features[None], labels)]

        found: list[float] = course.once(f"pruned-{number}", score)
        return found

    @torch.no_grad()
    def _said(self, net: Net) -> tuple[Tensor, Tensor | None]:
        """A probe's class probabilities [n, C], and what its last layer reads where ``grand`` asks for it."""
        taps = (self.choice.tap,) if self.choice.score == "grand" and self.choice.tap is not None else ()
        said = [net(batch, taps=taps) for batch in self.course.batches(self.course.index)]
        probs = torch.cat([net.predict(each).float().softmax(1).cpu() for each in said])
        if not taps:
            return probs, None
        return probs, torch.cat([each.features[taps[0]].float().flatten(1).cpu() for each in said])
