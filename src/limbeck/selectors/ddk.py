"""Domains in which the student lags most behind its teacher are drawn more often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from limbeck.contracts import Batch, Course, Outputs, Selection, Selector
from limbeck.data.domains import DomainSampler
from limbeck.engine.seeds import derive
from limbeck.errors import ConfigError, unknown
from limbeck.losses.chunked import chunked_items
from limbeck.metrics.domains import domain_perplexity, initial_factor, update_factor
from limbeck.objectives._tokens import hidden_of

Rule = Literal["smooth", "plain", "equal", "size"]
First = Literal["factor", "equal"]
Interval = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DDK(Selector):
    """The mixture of domains follows the ratio of the student's perplexity to the teacher's (DDK).

    An epoch is an interval: ``scenario.epoch_steps`` is the paper's K. Before each one the perplexities are
    taken on the validation part, and its samples are drawn: a domain by its share, then that domain's next
    unused sample. The paper's loss is the objectives ``labels`` and 0.2 of ``divergence``.

    Attributes:
        asks: it compares what both say of the same tokens.
        asks_all: perplexities are of any token, however improbable.
        rule: ``smooth``, the paper's; ``plain``, without its smooth updating; and to compare with, ``equal``
            shares, and shares by the domains' ``size``.
        alpha: smoothing of the rule ``smooth``, in [0, 1]; at 0 all domains count alike.
        first: shares of the first interval: ``factor`` from the perplexities, or ``equal``.
        validation: validation samples of each domain, its first ones, at least 1; None = all.

    Raises:
        ConfigError: a field out of its range; ``prepare`` without a teacher.
        DataError: a domain has nothing to learn from, or no validation samples.
        NonFiniteError: a perplexity is not finite.

    Source: DDK, NeurIPS 2024 (arXiv 2407.16154), section 3 and algorithm 1.
    Differs: the first interval is drawn by eq. 1, where the algorithm draws it evenly (``first: equal``).
    """

    asks: ClassVar[bool] = True
    asks_all: ClassVar[bool] = True

    rule: Rule = "smooth"
    alpha: float = 0.5
    first: First = "factor"
    validation: int | None = 500

    def __post_init__(self) -> None:
        for name, kind in (("rule", Rule), ("first", First)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, getattr(self, name), get_args(kind))
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}: allowed are values from 0 to 1")
        if self.validation is not None and self.validation < 1:
            raise ConfigError(f"validation is {self.validation}: allowed are values of at least 1, or null")

    def prepare(self, course: Course) -> Selection:
        """Find the samples of each domain, and what the teacher says of them."""
        if course.teacher is None:
            raise ConfigError("selector ddk compares with a teacher but teacher is none: name one")
        return Mixture(self, course)

    def shares(self, last: Tensor | None, student: Tensor, teacher: Tensor, sizes: Sequence[int]) -> Tensor:
        """Shares [N] of the next interval, after ``last`` ones; None = it is the first."""
        equal = torch.full((len(sizes),), 1 / len(sizes), dtype=torch.float64)
        match self.rule:
            case "equal":
                return equal
            case "size":
                return torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        if last is None and self.first == "equal":
            return equal
        if last is None or self.rule == "plain":
            return initial_factor(student, teacher)
        return update_factor(last, student, teacher, self.alpha)


class Mixture(Selection):
    """``DDK`` at work. What it measures and draws follows from what the run keeps of the interval before.

    Attributes:
        begun: how many intervals have begun.
    """

    begun: Tensor

    def __init__(self, plan: DDK, course: Course) -> None:
        super().__init__(plan)
        self.plan, self.course = plan, course
        self.register_buffer("begun", torch.zeros((), dtype=torch.int64))
        own, held_out = course.labels[course.index], course.labels[course.held_out]
        self.count = int(course.labels.max()) + 1
        self.places = [course.index[own == domain] for domain in range(self.count)]
        watched = [course.held_out[held_out == domain][: plan.validation] for domain in range(self.count)]
        self.watched, self.sizes = torch.cat(watched), [len(places) for places in self.places]
        self.seed = derive(int(course.generator("domains").initial_seed()))
        self.teacher = course.once("ddk-teacher", lambda: self.perplexities(course.ask))

    def indices(self, index: Tensor, labels: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        """The samples of interval ``epoch``."""
        self.begun.fill_(max(int(self.begun), epoch + 1))
        return self.drawn(self.interval(epoch))[0]

    def interval(self, number: int) -> Interval:
        """Shares of an interval, the perplexities they follow from, and the sampler as it was before."""

        def measure() -> Interval:
            last = self.interval(number - 1) if number else None
            student = self.perplexities(self.student)
            shares = self.plan.shares(
                None if last is None else torch.tensor(last["shares"], dtype=torch.float64),
                torch.tensor(student, dtype=torch.float64), torch.tensor(self.teacher, dtype=torch.float64),
                self.sizes,
            )  # fmt: skip
            before = DomainSampler(self.sizes, self.seed) if last is None else self.drawn(last)[1]
            return {"shares": shares.tolist(), "perplexity": student, "sampler": before.state()}

        found: Interval = self.course.once(f"ddk-{number}", measure)
        return found

    def drawn(self, interval: Interval) -> tuple[Tensor, DomainSampler]:
        """The samples of an interval, and the sampler behind them."""
        sampler = DomainSampler(self.sizes, self.seed)
        sampler.restore(interval["sampler"])
        domains, items = sampler.draw(interval["shares"], self.course.epoch_samples)
        pairs = zip(domains.tolist(), items.tolist(), strict=True)
        return torch.stack([self.places[domain][item] for domain, item in pairs]), sampler

    def student(self, batch: Batch) -> Outputs:
        """What the student says as it stands."""
        found: Outputs = self.course.student(batch)
        return found

    @torch.no_grad()
    def perplexities(self, ask: Any) -> list[float]:
        """The perplexity of each domain's validation samples, as ``ask`` answers to them."""
        student, sums = self.course.student, torch.zeros(2, self.count, dtype=torch.float64)
        training = student.training
        student.eval()
        for batch in self.course.batches(self.watched):
            assert batch.rows is not None
            domain = self.course.labels[batch.index.cpu()][batch.rows.cpu() // batch.inputs.shape[1]]
            nll, _ = chunked_items(hidden_of(ask(batch)), labels=batch.labels)
            for total, values in zip(sums, (nll, torch.ones_like(nll)), strict=True):
                total.index_add_(0, domain, values.cpu().double())
        student.train(training)
        return domain_perplexity(*sums).tolist()

    def facts(self) -> dict[str, Any]:
        """By interval the domains' shares and the ratios of perplexity that they follow from, and the mean
        and the largest of the ratios that the training ends with."""
        intervals = [self.interval(number) for number in range(int(self.begun) + 1)]
        ratios = [
            [own / other for own, other in zip(each["perplexity"], self.teacher, strict=True)]
            for each in intervals
        ]
        return {
            "shares": [each["shares"] for each in intervals[:-1]], "ratios": ratios, "sizes": self.sizes,
            "ratio_mean": sum(ratios[-1]) / self.count, "ratio_max": max(ratios[-1]),
        }  # fmt: skip
