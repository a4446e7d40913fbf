"""A guard on what selectors give: a batch in which no sample counts teaches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from limbeck.contracts import Batch, Outputs, Progress, Selection
from limbeck.engine.guards import FiniteFlag
from limbeck.errors import ConfigError, NonFiniteError


class Weighed(Selection):
    """A selection whose weights are looked at.

    On an accelerator the answer is read a step later, so that no step waits for it.

    Args:
        selection: it stays the scenario's, so it is not registered.
        objectives: names of all that is matched: what the selection leaves out counts as it is.
    """

    def __init__(self, selection: Selection, objectives: Iterable[str]) -> None:
        super().__init__(selection.selector)
        self.inner, self.objectives = (selection,), set(objectives)
        self.flag: FiniteFlag | None = None

    @property
    def weighs(self) -> bool:
        """Whether the selection may give weights."""
        (selection,) = self.inner
        return selection.weighs

    def weights(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
    ) -> Tensor | Mapping[str, Tensor] | None:
        """As ``Selector.weights``.

        Raises:
            ConfigError: they are 0 for all samples of a batch and all objectives, or one is negative or no
                number.
        """
        (selection,) = self.inner
        found = selection.weights(batch, student, teacher, at)
        parts = [found] if isinstance(found, Tensor) else list((found or {}).values())
        if not parts or torch.compiler.is_compiling():
            return found
        every = isinstance(found, Tensor) or self.objectives <= set(found or ())
        flag = FiniteFlag({"weights": _state(parts, every=every)})
        due, self.flag = flag if flag.event is None else self.flag, flag
        try:
            if due is not None:
                due.check()
        except NonFiniteError:
            where = f"at epoch {at.epoch}, step {at.step}"
            if due is not None and due.values.isnan().any():
                raise ConfigError(
                    f"the selector gives a weight that is negative or no number, {where}: allowed are finite "
                    "values of at least 0"
                ) from None
            raise ConfigError(
                f"the selector gives all samples of a batch the weight 0, {where}: nothing can be learnt "
                "from it; let it keep some weight"
            ) from None
        return found


def _state(parts: Sequence[Tensor], *, every: bool) -> Tensor:
    """0 where weights can be learnt with, infinite where all are 0, NaN where one is no weight.

    Args:
        every: whether ``parts`` are those of all objectives.
    """
    lowest, largest = (
        torch.stack([end(part.detach()) for part in parts]) for end in (torch.amin, torch.amax)
    )
    sound = (lowest >= 0) & torch.isfinite(largest)
    nothing = (largest.amax() == 0) & every
    return torch.where(sound.all(), torch.where(nothing, torch.inf, 0.0), torch.nan)
