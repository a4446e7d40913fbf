"""KD-AIF: samples count by the influence that each has on the loss of held-out samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, get_args

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from limbeck import losses
from limbeck.contracts import Batch, Course, Net, Outputs, Progress, Selection, Selector
from limbeck.engine import curvature
from limbeck.engine.curvature import Losses, Params
from limbeck.errors import ConfigError, unknown

Solver = Literal["auto", "exact", "cg", "lissa"]
Layer = Literal["auto", "all", "last"]
Map = Literal["exp", "sigmoid"]
Sign = Literal["correct", "released"]

MOST = 2000  # numbers whose Hessian is formed: 32 MB in float64, and as many backward passes a batch
LEFT = 0.1  # share of the gradient that a solver may leave without a warning


def influence_to_weight(
    influence: Tensor, map: Map = "exp", *, sign: Sign = "correct", clip: float = 0.01, mean_one: bool = False
) -> Tensor:
    """Weights [n] >= 0 from influences [n]: helpful samples (below 0) count more, harmful ones less.

    ``exp`` scales the influences to r in [-1, 1] by their smallest and largest and gives exp(-r), in
    [1/e, e]; ``sigmoid`` gives 2 sigmoid(-I / deviation), in (0, 2), and 1 where the influence is 0. Where
    all influences are equal all weights are 1. A NaN gets the weight 0 and counts nowhere else.

    Args:
        influence: I; below 0 where counting the sample more lowers the held-out loss.
        map: which of the two.
        sign: ``released`` turns the direction round: harmful samples count more.
        clip: influences beyond the quantiles clip and 1 - clip are set to these, in [0, 0.5).
        mean_one: scale the weights so that their mean over the finite influences is 1.

    Source: KD-AIF (arXiv 2501.02705), its abstract for the sigmoid, the official notebooks for the rest.

    Differs: the notebooks give exp(+r), which counts harmful samples more, and clip nothing, so that a single
    sample sets the scale.
    """
    sound = torch.isfinite(influence)
    known = influence[sound]
    if clip and len(known):
        known = known.clamp(known.quantile(clip), known.quantile(1 - clip))
    spread = known.max() - known.min() if len(known) else torch.zeros(())
    if len(known) == 0 or spread == 0:
        found = torch.ones_like(known)
    elif map == "exp":
        scaled = 2 * (known - known.min()) / spread - 1
        found = torch.exp(scaled if sign == "released" else -scaled)
    else:
        scaled = known / known.std(correction=0)
        found = 2 * torch.sigmoid(scaled if sign == "released" else -scaled)
    weights = torch.zeros_like(influence)
    weights[sound] = found / found.mean() if mean_one else found
    return weights


def influence_of(
    per_sample: Losses,
    params: Params,
    training: Iterable[Batch],
    held_out: Iterable[Batch],
    *,
    solver: Solver = "auto",
    damping: float = 0.01,
    scale: float = 25.0,
    steps: int = 100,
) -> tuple[Tensor, float]:
    """How the held-out loss changes with the weight of each training sample: I = d J / d eps [n].

    I_i = -<g_i, (H + damping I)^-1 v> / n, with g_i the gradient of sample i's loss, H the Hessian of the
    mean loss of the n training samples and v the gradient of the mean held-out loss. Below 0 a sample helps.

    Args:
        per_sample: loss [B] of a batch's samples as a function of ``params``.
        params: where both losses are looked at; leaves that require a gradient.
        training: batches in a fixed order, gone over more than once.
        held_out: batches of other samples.
        solver: ``exact``, ``cg``, ``lissa`` (one batch a step, in turn), or ``auto``: ``exact`` up to 2000
            parameters and ``cg`` above.
        damping: > 0.
        scale: of ``lissa``.
        steps: at most so many products of ``cg``; exactly so many of ``lissa``.

    Returns:
        The influences, and what the solution u leaves: ||(H + damping I) u - v|| / ||v||.

    Source: Koh and Liang, ICML 2017 (arXiv 1703.04730), section 2.
    """
    target = curvature.gradient(per_sample, params, held_out)

    def product(vector: Tensor, data: Iterable[Batch] = training) -> Tensor:
        return curvature.hessian_product(per_sample, params, data, vector)

    if solver == "exact" or (solver == "auto" and len(target) <= MOST):
        solution = curvature.solve(curvature.hessian(per_sample, params, training), target, damping)
    elif solver == "lissa":
        turns = cycle(training)
        solution = curvature.lissa(
            lambda vector: product(vector, [next(turns)]), target, damping, scale=scale, steps=steps
        )
    else:
        solution = curvature.conjugate_gradient(product, target, damping, steps=steps)
    left = product(solution) + damping * solution - target
    slopes = curvature.slopes(per_sample, params, training, solution)
    return -slopes / len(slopes), float(left.norm() / target.norm().clamp(min=1e-30))


def last_layer(net: Net, batch: Batch) -> list[str]:
    """Names of the parameters of the layer that a forward pass of ``net`` over ``batch`` comes to last.

    A layer is a module with parameters of its own that require a gradient.
    """
    reached: list[str] = []
    hooks = [
        part.register_forward_hook(lambda *_, path=path: reached.append(path))
        for path, part in net.named_modules()
        if any(p.requires_grad for p in part.parameters(recurse=False))
    ]
    try:
        net(batch)
    finally:
        for hook in hooks:
            hook.remove()
    layer = net.get_submodule(reached[-1])
    own = [name for name, p in layer.named_parameters(recurse=False) if p.requires_grad]
    return [f"{reached[-1]}.{name}".lstrip(".") for name in own]


@dataclass(frozen=True, kw_only=True)
class Influence(Selector):
    """Samples that lower the held-out loss count more, those that raise it less (KD-AIF, Wu et al. 2025).

    Before the training a fresh student, the probe, is trained with uniform weights. Influence functions tell
    how the cross entropy of the held-out samples would change if a training sample counted a little more;
    these influences are mapped to the weights of all objectives, once.

    Attributes:
        probe_epochs: passes of the probe over the data, with the scenario's optimiser, at least 1.
        taught: the probe learns by the recipe's objectives; else from the labels alone. The influences are
            those of the labels' cross entropy in either case.
        layer: which parameters of the probe are looked at: ``all``, those of the ``last`` layer, or ``auto``:
            all up to 2000 numbers, and above that the last layer.
        solver: of the damped inverse Hessian (``influence_of``).
        damping: added to the Hessian's diagonal, > 0.
        scale: of the solver ``lissa``, > 0; too small a value makes it diverge.
        steps: products of ``cg`` at most, of ``lissa`` exactly, at least 1.
        map: from influences to weights (``influence_to_weight``).
        sign: ``released`` counts harmful samples more, as the official notebooks do.
        clip: share of the influences at either end that is cut off before the map, in [0, 0.5).
        mean_one: scale the weights to the mean 1, so that they leave the learning rate as it is.

    Raises:
        ConfigError: a field out of its range; ``prepare`` finds no held-out samples.
        NonFiniteError: ``lissa`` diverges.

    Source: KD-AIF (arXiv 2501.02705) and its official notebooks.

    Differs: harmful samples count less (see ``influence_to_weight``). The Hessian-vector product detaches its
    vector; the released one does not, which adds terms. What the released code calls validation is its test
    set; here samples are held out of the training set. Weights are estimated once, before the training.
    EK-FAC is not offered. A sample whose label is hidden counts with the teacher's class.
    """

    probe_epochs: int = 20
    taught: bool = True
    layer: Layer = "auto"
    solver: Solver = "auto"
    damping: float = 0.01
    scale: float = 25.0
    steps: int = 100
    map: Map = "exp"
    sign: Sign = "correct"
    clip: float = 0.01
    mean_one: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("layer", Layer), ("solver", Solver), ("map", Map), ("sign", Sign)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, getattr(self, name), get_args(kind))
        for name in ("probe_epochs", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least 1")
        for name in ("damping", "scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are finite values above 0")
        if not 0 <= self.clip < 0.5:
            raise ConfigError(f"clip is {self.clip}: allowed are shares from 0 to below 0.5")

    def prepare(self, course: Course) -> Selection:
        """See ``Selector.prepare``: trains the probe and weighs every sample."""
        if len(course.held_out) == 0:
            raise ConfigError(
                "selector influence asks held-out samples but scenario.validation is 0: set it to 0.1, say"
            )
        if course.teacher is None and next(iter(course.batches(course.index[:1]))).labelled is not None:
            raise ConfigError(
                "selector influence takes the teacher's class where data.labelled hides the label but "
                "teacher is none: name one"
            )
        probe = course.probe("influence", self.probe_epochs, taught=self.taught)
        found = course.once("influence", lambda: Estimate(self, course, probe).found())
        return Weighted(self, course, found)


class Estimate:
    """The influences of the training samples on a probe that was trained on them."""

    def __init__(self, plan: Influence, course: Course, probe: Net) -> None:
        self.plan, self.course, self.probe = plan, course, probe
        learns = sum(p.numel() for p in probe.parameters() if p.requires_grad)
        whole = plan.layer == "all" or (plan.layer == "auto" and learns <= MOST)
        names = None if whole else last_layer(probe, next(iter(course.batches(course.index[:1]))))
        self.params = curvature.parameters_of(probe, names)

    def per_sample(self, params: Params, batch: Batch) -> Tensor:
        """Cross entropy [B] of the probe with ``params``."""
        said = self.probe.predict(curvature.call(self.probe, params, batch))
        return losses.cross_entropy(said, self.targets(batch), reduction="none")

    def targets(self, batch: Batch) -> Tensor:
        """The labels [B], and the teacher's class where they are hidden."""
        if batch.labelled is None:
            return batch.labels
        return torch.where(batch.labelled, batch.labels, self.course.ask(batch).logits.argmax(1))

    def held_out(self) -> Tensor:
        """The held-out samples whose label may be read."""
        known = [batch.labelled for batch in self.course.batches(self.course.held_out)]
        marks = [mark for mark in known if mark is not None]
        return self.course.held_out[torch.cat(marks).cpu()] if marks else self.course.held_out

    def found(self) -> dict[str, Any]:
        """Influences [n] of ``course.index``, None for a gradient that is not finite, and how it went.

        Raises:
            ConfigError: no held-out label may be read.
        """
        plan, course, data, held_out = self.plan, self.course, self.course.index, self.held_out()
        if len(held_out) == 0:
            raise ConfigError(
                f"selector influence asks held-out samples but no label of these {len(course.held_out)} may "
                "be read: hold out more, or show more labels"
            )
        ones = curvature.flat(torch.ones_like(value) for value in self.params.values())
        with curvature.at_rest(self.probe):
            spread = curvature.slopes(self.per_sample, self.params, Sweep(course, data), ones)
            sound = torch.isfinite(spread).cpu()
            influence, left = influence_of(
                self.per_sample, self.params, Sweep(course, data[sound]), Sweep(course, held_out),
                solver=plan.solver, damping=plan.damping, scale=plan.scale, steps=plan.steps,
            )  # fmt: skip
        every = torch.full((len(data),), torch.nan)
        every[sound] = influence.float().cpu()
        return {
            "influence": [None if math.isnan(x) else x for x in every.tolist()],
            "parameters": len(ones), "left": left,
        }  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """Batches over some samples of a course, as often as they are asked for."""

    course: Course
    index: Tensor

    def __iter__(self) -> Iterator[Batch]:
        return self.course.batches(self.index)


class Weighted(Selection):
    """``Influence`` at work.

    Attributes:
        weight: of each sample of the data [N]; 0 for those that are not learnt from.
    """

    weight: Tensor

    def __init__(self, plan: Influence, course: Course, found: dict[str, Any]) -> None:
        super().__init__(plan)
        self.noisy = None if course.noisy is None else course.noisy[course.index]
        self.parameters_seen, self.left = found["parameters"], found["left"]
        self.influence = torch.tensor([math.nan if x is None else x for x in found["influence"]])
        own = influence_to_weight(
            self.influence, plan.map, sign=plan.sign, clip=plan.clip, mean_one=plan.mean_one
        )
        every = torch.zeros(len(course.labels))
        every[course.index] = own
        self.own = own
        self.register_buffer("weight", every.to(next(course.student.parameters()).device))
        spoilt = course.index[torch.isnan(self.influence)]
        if len(spoilt):
            course.warn(
                f"influence: {len(spoilt)} samples, first {int(spoilt[0])}, have no finite gradient: weight 0"
            )
        if self.left > LEFT:
            course.warn(
                f"influence: the solver left {self.left:.0%} of the gradient: raise selector.steps or damping"
            )

    def weights(self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress) -> Tensor:
        """Weights [B] for all objectives."""
        return self.weight[batch.index]

    def facts(self) -> dict[str, Any]:
        """Mean, smallest and largest weight; where the data says which labels are wrong, the mean weight of
        these and of the others, and how well the influence tells them apart (area under the ROC curve)."""
        own = self.own
        facts: dict[str, Any] = {
            "weight": {"mean": float(own.mean()), "min": float(own.min()), "max": float(own.max())},
            "parameters": self.parameters_seen,
            "solver_left": self.left,
        }
        if self.noisy is not None and self.noisy.any() and not self.noisy.all():
            facts["groups"] = {
                name: {"samples": int(group.sum()), "weight": float(own[group].mean())}
                for name, group in (("wrong_label", self.noisy), ("right_label", ~self.noisy))
            }
            known = ~torch.isnan(self.influence)
            facts["detects_wrong_labels"] = float(
                roc_auc_score(self.noisy[known].numpy(), self.influence[known].numpy())
            )
        return facts
