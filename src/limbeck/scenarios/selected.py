"""Batches over what a selector chooses."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.contracts import Batch, Selection
from limbeck.data.together import Going, Sampled
from limbeck.engine.run import Run
from limbeck.errors import ConfigError


class Selected:
    """Batches over what a selector finds worth a step in each epoch.

    Args:
        steps: of an epoch: what was selected goes round, or is cut off; None = once over what was selected.
    """

    def __init__(self, batches: Sampled, selection: Selection, run: Run, *, steps: int | None = None) -> None:
        self.batches, self.selection, self.run = batches, selection, run
        self.goes = steps is not None
        self.steps = self._part(0).steps if steps is None else steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from step ``start`` on."""
        part = self._part(epoch)
        return Going(part, self.steps).epoch(epoch, start) if self.goes else part.epoch(epoch, start)

    def _part(self, epoch: int) -> Sampled:
        index = self.batches.index
        draws = self.run.generator("selector", self.batches.seed, epoch)
        chosen = self.selection.indices(index, self.batches.labels[index], epoch, draws)
        if len(chosen) == 0:
            raise ConfigError(
                f"the selector left no sample in epoch {epoch}: let it keep more, by a lower threshold or a "
                "larger fraction"
            )
        return self.batches if chosen is index else self.batches.subset(chosen)
