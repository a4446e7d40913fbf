"""What self-distillation of networks and of kernels share: alphas, generations, their record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.contracts import Net, Spec
from limbeck.errors import ConfigError
from limbeck.metrics.kernel_ridge import OptimalAlpha, optimal_alpha
from limbeck.scenarios.fit_together import check_classes, has_teacher, load_data
from limbeck.scenarios.pair import Pair
from limbeck.scenarios.static import Desk
from limbeck.selectors.all import All
from limbeck.teachers.none import NoTeacher

Alpha = float | Literal["optimal"] | tuple[float, ...]


@dataclass(frozen=True)
class Given:
    """A network that is there already, in the place of a choice to build."""

    net: Net

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """The network."""
        return self.net


def check_alpha(alpha: Alpha, generations: int) -> None:
    """Raise ``ConfigError`` unless ``alpha`` fits as many generations."""
    if generations < 1:
        raise ConfigError(f"generations is {generations}: allowed are values of at least 1")
    if isinstance(alpha, tuple) and len(alpha) != generations - 1:
        raise ConfigError(
            f"alpha has {len(alpha)} entries but {generations - 1} generations have a teacher: give each one"
        )
    given = () if isinstance(alpha, str) else alpha if isinstance(alpha, tuple) else (alpha,)
    if any(not 0 <= value <= 1 for value in given):
        raise ConfigError(
            f"alpha is {alpha}: allowed are weights from 0 to 1, one or one a generation, or optimal"
        )


def check_recipe(recipe: Any, alpha: Alpha, validation: float) -> None:
    """Raise ``ConfigError`` for what has no place in self-distillation, and load the data."""
    if has_teacher(recipe):
        raise ConfigError(
            f"teacher is {type(recipe.teacher).__name__} but each generation is taught by the one before: "
            "set teacher to none"
        )
    if not isinstance(recipe.selector, All):
        raise ConfigError("self-distillation learns from all samples alike: leave selector out")
    if alpha == "optimal" and validation == 0:
        raise ConfigError(
            "alpha is optimal but scenario.validation is 0: hold out a share of the samples to choose it on"
        )
    train = load_data(recipe).train
    check_classes(len(train.classes))
    if alpha == "optimal" and train.labelled is not None:
        raise ConfigError(
            "alpha is optimal, chosen by the labels of held-out samples, but the data hides labels: give "
            "alpha as a number"
        )


def of_generation(alpha: Alpha, number: int) -> float | None:
    """The fixed weight of the true targets in generation ``number`` (from 2 on); None = to be chosen."""
    if isinstance(alpha, str):
        return None
    return alpha[number - 2] if isinstance(alpha, tuple) else alpha


def pair_of(desk: Desk, student: Net, teacher: Net | None) -> Pair:
    """Two given networks at work on the desk's data; the teacher stands still."""
    if teacher is not None:
        teacher.requires_grad_(False)
    recipe = replace(
        desk.recipe,
        student=Given(student),
        teacher=NoTeacher() if teacher is None else Given(teacher),
    )
    example = next(iter(desk.learning.in_order(2).epoch(0)))
    return Pair(recipe, desk.run, desk.pair.spec, example, samples=len(desk.splits.train))


def chosen(from_labels: Tensor, from_teacher: Tensor, truth: Tensor) -> OptimalAlpha:
    """``optimal_alpha`` for predictions [N, C] and the classes [N] of the validation samples."""
    return optimal_alpha(from_labels, from_teacher, F.one_hot(truth, from_labels.shape[1]))


def record(
    number: int, alpha: float | None, found: OptimalAlpha | None, shares: Callable[[], tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """What ``result.json`` says of a generation.

    Args:
        number: of the generation, from 1.
        alpha: weight of the true targets; None for the first.
        found: how alpha was chosen; None where it was given.
        shares: gives its class shares [N, C] on the test split, and the classes [N].
    """
    said, truth = shares()
    return {
        "generation": number, "alpha": alpha, "chosen": None if found is None else asdict(found),
        "accuracy": 100 * float((said.argmax(1) == truth).double().mean()),
        "squared_error": squared_error(said, truth),
    }  # fmt: skip


def squared_error(shares: Tensor, truth: Tensor) -> float:
    """Mean over samples of ‖shares - onehot‖²; divided by C it is the mean over samples and classes."""
    wanted = F.one_hot(truth, shares.shape[1]).double()
    return float((shares.double() - wanted).square().sum(1).mean())
