"""Distillation from a teacher whose logits are disturbed: how much of a gain is the teacher's knowledge?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck import losses
from limbeck.contracts import NO_FACTS, Batch, Facts, Objective, Outputs, Progress
from limbeck.engine.seeds import derive
from limbeck.objectives._shared import above, at_least, same_classes


@dataclass(frozen=True, kw_only=True)
class NoisyKD(Objective):
    """KD from logits with normal noise, drawn anew in each step: the control of a study of fidelity.

    Without noise it is ``kd``. Reads logits; of language models it holds those of all tokens of a batch.

    Attributes:
        zero_at_teacher: whether all terms are 0 where the student gives what the teacher gives.
        weight: factor of the term, >= 0.
        temperature: T > 0; the term carries T².
        sigma: deviation of the noise on the teacher's logits, >= 0; 1, 2 and 5 in the paper.

    Raises:
        ConfigError: a field out of its range.
        ShapeError: ``build`` finds different numbers of classes.

    Source: Ramesh et al., Findings of ACL 2025 (arXiv 2505.15442), the ablation of the teacher's logits.
    """

    zero_at_teacher: ClassVar[bool] = True

    weight: float = 1.0
    temperature: float = 1.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        at_least("weight", self.weight, 0)
        at_least("sigma", self.sigma, 0)
        above("temperature", self.temperature, 0)

    def build(self, student: Outputs, teacher: Outputs, facts: Facts = NO_FACTS) -> nn.Module:
        """Nothing to learn; the class counts are compared."""
        same_classes(student, teacher)
        return Disturbed(self, facts.seed)


class Disturbed(nn.Module):
    """``NoisyKD`` with the seed of its noise."""

    def __init__(self, plan: NoisyKD, seed: int) -> None:
        super().__init__()
        self.plan, self.seed = plan, seed

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """``{"noisy_kd": weight * T² * KL(teacher with noise ‖ student)}``."""
        plan, logits = self.plan, self.disturbed(teacher.logits, at)
        loss = losses.kl_divergence(
            student.soft, logits, plan.temperature, mask=student.mask, weights=batch.weight
        )
        return {"noisy_kd": plan.weight * loss}

    def disturbed(self, logits: Tensor, at: Progress) -> Tensor:
        """The teacher's logits with a step's noise: a function of seed, task and step alone."""
        if not self.plan.sigma:
            return logits
        seed = derive(self.seed, "noise", at.task, at.step)
        draws = torch.Generator(device=logits.device).manual_seed(seed)
        noise = torch.randn(logits.shape, generator=draws, device=logits.device, dtype=logits.dtype)
        return logits + self.plan.sigma * noise
