"""Checks that keep a wrong run from looking fine."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from limbeck.engine.shards import norm
from limbeck.engine.state import constant_prefixes
from limbeck.errors import GuardError, NonFiniteError

GRADIENT = "the gradient"  # stands among the terms for the norm of all gradients


class Frozen:
    """Holds frozen modules to their word: parameters and buffers must not change.

    Args:
        modules: frozen modules by the name that a message shall use.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.before = {name: checksum(module) for name, module in modules.items()}

    def check(self) -> None:
        """Raise ``GuardError`` if a parameter or buffer changed since construction."""
        for name, module in self.modules.items():
            now = checksum(module)
            for key, value in self.before[name].items():
                if now.get(key) != value:
                    raise GuardError(f"frozen {name} changed at {key!r}: something updates what must stay")


def checksum(module: nn.Module) -> dict[str, int]:
    """CRC-32 of each parameter and buffer."""
    return {
        name: zlib.crc32(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        for name, value in module.state_dict().items()
    }


class Before:
    """The random state and the buffers from before a step, so that a spoilt step can be taken back.

    Args:
        modules: what steps are taken of; their constant parts are left out.
        device: where the random numbers of a step are drawn, besides the CPU.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self.cuda = device if device.type == "cuda" else None
        self.buffers = [
            buffer
            for module in modules
            for name, buffer in module.named_buffers()
            if not name.startswith(constant_prefixes(module))
        ]
        self.kept = [buffer.clone() for buffer in self.buffers]
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the state as it is now."""
        self.rng = torch.get_rng_state()
        self.cuda_rng = None if self.cuda is None else torch.cuda.get_rng_state(self.cuda)
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to what was kept."""
        torch.set_rng_state(self.rng)
        if self.cuda_rng is not None and self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda_rng, self.cuda)
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)


def check_orphans(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """After the first backward: what has a gradient is optimised, and what is optimised has a gradient.

    Parts that say of themselves that a step reaches some parameters alone (``Net.partial``) are excused.

    Raises:
        GuardError: naming the first parameter of either kind.
    """
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    partial = [part for part in module.modules() if getattr(part, "partial", False)]
    excused = {id(p) for part in partial for p in part.parameters()}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and id(parameter) not in optimised:
            raise GuardError(f"{name} receives a gradient but no optimiser holds it: it would never learn")
        if parameter.grad is None and id(parameter) in optimised - excused:
            raise GuardError(
                f"{name} is optimised but no loss term reaches it: choose a network "
                "without it, or add an objective that reads it"
            )


class FiniteFlag:
    """Whether all terms are finite, asked for before the optimiser step without stalling the device.

    On CUDA the answer is copied while the backward pass runs; reading it waits for the forward only.
    """

    def __init__(self, terms: Mapping[str, Tensor]) -> None:
        self.names = [f"loss term {name!r}" if name != GRADIENT else name for name in terms]
        values = torch.stack([t.detach().float() for t in terms.values()])
        self.event: torch.cuda.Event | None = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.event.record()
            values = host
        self.values = values

    def check(self) -> None:
        """Raise ``NonFiniteError`` naming the first term that is no number."""
        if self.event is not None:
            self.event.synchronize()
        finite = torch.isfinite(self.values)
        if not finite.all():
            place = int((~finite).nonzero()[0])
            raise NonFiniteError(f"{self.names[place]} is {float(self.values[place])}")


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, a scalar."""
    return norm(p.grad for p in parameters if p.grad is not None)


def gradient_shares(
    terms: Mapping[str, Tensor], parameters: Iterable[Tensor], averaged: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Share of each term in the sum of the gradient norms of all terms, in [0, 1].

    The graph is kept, so that the ordinary backward pass can follow.

    Args:
        averaged: makes of this rank's gradient that of all.
    """
    learned = [p for p in parameters if p.requires_grad]
    norms: dict[str, float] = {}
    for name, term in terms.items():
        if not term.requires_grad:
            norms[name] = 0.0
            continue
        grads = torch.autograd.grad(term, learned, retain_graph=True, allow_unused=True)
        squares = [averaged(g).float().square().sum() for g in grads if g is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    total = sum(norms.values())
    return {name: norm / total if total > 0 else 0.0 for name, norm in norms.items()}
