"""Optimisers and learning-rate schedules as plain settings; a schedule is a function of progress."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from limbeck.contracts import Progress
from limbeck.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optim:
    """An optimiser and its schedule.

    Attributes:
        name: ``adam``, ``adamw`` or ``sgd``.
        lr: base learning rate, > 0.
        betas: of Adam and AdamW.
        momentum: of SGD.
        weight_decay: >= 0. Prompt learning needs 0: frozen rows must not drift.
        clip: largest gradient norm; None = no clipping.
        schedule: ``constant``; ``cosine`` to zero over all steps; ``coda``, the epoch-wise cosine of the
            CODA-Prompt code, whose first two epochs both run at the base rate; ``multistep``.
        warmup: share of all steps with a linear rise from 0, in [0, 1).
        milestones: shares of all epochs after which ``multistep`` multiplies the rate by ``gamma``.
        gamma: factor of ``multistep``.
        ema: decay of a moving average of the weights, in (0, 1), which takes their place when the training
            ends; None = the last weights.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: Literal["constant", "cosine", "coda", "multistep"] = "coda"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    gamma: float = 0.1
    ema: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}: allowed are values above 0")
        if not self.lr < math.inf:
            raise ConfigError(f"lr is {self.lr}: allowed are finite values above 0")
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay is {self.weight_decay}: allowed are values of at least 0")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"clip is {self.clip}: allowed are values above 0, or null for no clipping")
        if not self.gamma > 0:
            raise ConfigError(f"gamma is {self.gamma}: allowed are values above 0")
        for name, values in (("betas", self.betas), ("momentum", (self.momentum,))):
            if not all(0 <= value < 1 for value in values):
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values from 0 to below 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema is {self.ema}: allowed are values between 0 and 1, or null for none")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is {self.warmup}: allowed are shares from 0 to below 1")

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """A fresh optimiser over ``groups`` of ``{"params": [...], "lr_scale": float}``."""
        known = [{"params": g["params"], "lr_scale": g.get("lr_scale", 1.0), "lr": self.lr} for g in groups]
        if self.name == "sgd":
            return torch.optim.SGD(known, momentum=self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(known, betas=self.betas, weight_decay=self.weight_decay)

    def rate(self, at: Progress) -> float:
        """The learning rate of a step."""
        start = self.warmup * at.steps
        if at.step < start:
            return self.lr * (at.step + 1) / (math.floor(start) + 1)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (at.step - start) / max(1.0, at.steps - start)))
        if self.schedule == "coda":
            return coda_cosine(self.lr, at.epoch, at.epochs)
        if self.schedule == "multistep":
            passed = sum(at.epoch >= share * at.epochs for share in self.milestones)
            return float(self.lr * self.gamma**passed)
        return self.lr

    def set_rate(self, optimizer: torch.optim.Optimizer, at: Progress) -> float:
        """Give every group its rate for this step; returns the base rate."""
        rate = self.rate(at)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    @torch.no_grad()
    def average(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the weights after a step into their moving average, which lives in the optimiser's state."""
        if self.ema is None:
            return
        for p in learned(optimizer):
            state = optimizer.state[p]
            state.setdefault("average", p.detach().clone()).lerp_(p, 1 - self.ema)

    @torch.no_grad()
    def settle(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the averages in the weights' place."""
        if self.ema is not None:
            for p in learned(optimizer):
                p.copy_(optimizer.state[p]["average"])


def learned(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def coda_cosine(base: float, epoch: int, epochs: int) -> float:
    """``base * cos(99 pi max(0, epoch - 1) / (200 (epochs - 1)))``; ``epoch`` counts from 0.

    Source: the schedule of the CODA-Prompt code as its trainer drives it (Smith et al., CVPR 2023).
    Epochs 0 and 1 both run at ``base``: an accident of the code, kept for exact reproduction.
    """
    if epochs <= 1:
        return base
    return base * math.cos(99 * math.pi * max(0, epoch - 1) / (200 * (epochs - 1)))


def trainable_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of all that learns in ``module``, as its parts ask for them.

    A part that has ``parameter_groups()`` states its own groups (with ``lr_scale``); the rest is one group.
    """
    groups: list[dict[str, Any]] = []
    taken: set[int] = set()
    for part in module.modules():
        if part is not module and hasattr(part, "parameter_groups"):
            for group in cast(Any, part).parameter_groups():
                params = [p for p in group["params"] if p.requires_grad and id(p) not in taken]
                taken.update(id(p) for p in params)
                groups.append({**group, "params": params})
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
    return [g for g in [*groups, {"params": rest}] if g["params"]]
