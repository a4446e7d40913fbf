"""What a network costs: parameters, multiply-adds, latency."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from limbeck.errors import ConfigError


def parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters of ``module``, shared ones once; of those that require a gradient on request."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def multiply_adds(call: Callable[[], Any]) -> int:
    """Multiply-adds of matrix products, convolutions and attention in one ``call``, without gradient.

    Counted by torch from the operators that run, so that a compiled or a cached call counts what it does.
    Elementwise work is not counted.
    """
    # torch knows no count for its fused attention on the CPU; the plain one is made of counted products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def latency(call: Callable[[], Any], *, warm_up: int = 3, repeats: int = 20) -> float:
    """Median time of one ``call`` in milliseconds, without gradient, after ``warm_up`` uncounted calls.

    Waits for the accelerator, where there is one, before each reading of the clock.

    Raises:
        ConfigError: fewer than one repeat.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats} but must be at least 1")
    with torch.no_grad():
        for _ in range(warm_up):
            call()
        return 1e3 * median(_seconds(call) for _ in range(repeats))


def _seconds(call: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
