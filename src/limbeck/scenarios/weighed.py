"""A guard on what selectors give: a batch in which no sample counts teaches nothing."""

from __future__ import annotations

from collections.abc import Mapping

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
    """

    def __init__(self, selection: Selection) -> None:
        super().__init__(selection.selector)
        self.inner = (selection,)
        self.flag: FiniteFlag | None = None

    def weights(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, at: Progress
    ) -> Tensor | Mapping[str, Tensor] | None:
        """As ``Selector.weights``.

        Raises:
            ConfigError: they are 0 for all samples of a batch and all objectives.
        """
        (selection,) = self.inner
        found = selection.weights(batch, student, teacher, at)
        parts = [found] if isinstance(found, Tensor) else list((found or {}).values())
        if not parts or torch.compiler.is_compiling():
            return found
        largest = torch.stack([part.detach().amax() for part in parts]).amax()
        flag = FiniteFlag({"weights": torch.where(largest == 0, torch.inf, 0.0)})
        due, self.flag = flag if flag.event is None else self.flag, flag
        try:
            if due is not None:
                due.check()
        except NonFiniteError:
            raise ConfigError(
                "the selector gives all samples of a batch the weight 0, "
                f"at epoch {at.epoch}, step {at.step}: nothing can be learnt from it; let it keep some weight"
            ) from None
        return found
