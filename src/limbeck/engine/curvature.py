"""Second derivatives of a network's loss: an unrolled step, Hessian-vector products, damped inverses.

Parameters are mappings from name to tensor; a vector over them is flat [P], in the mapping's order. What is
asked for is found without materialising the gradients of single samples: a product of all of them [n, P] with
one vector [P] costs two backward passes over the data, whatever n and P are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from limbeck.contracts import Batch
from limbeck.errors import NonFiniteError

Params = Mapping[str, Tensor]
Losses = Callable[[Params, Batch], Tensor]
"""Loss [B] of each sample of a batch, as a function of parameters."""
Product = Callable[[Tensor], Tensor]
"""A symmetric matrix [P, P] times a vector [P]."""

ROWS = 64  # of a Hessian that are computed together


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Within, ``module`` is in evaluation mode, and attention takes a form that can be derived twice."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def parameters_of(module: nn.Module, only: Iterable[str] | None = None) -> dict[str, Tensor]:
    """What learns in ``module``, by name, cut off from it: gradients with respect to these reach no weight.

    Args:
        only: names to take; None = all that require a gradient.
    """
    names = None if only is None else set(only)
    return {
        name: value.detach().requires_grad_()
        for name, value in module.named_parameters()
        if (value.requires_grad if names is None else name in names)
    }


def call(module: nn.Module, params: Params, *given: Any, under: str = "", **named: Any) -> Any:
    """``module(*given, **named)`` with ``params`` in the place of its own.

    Its other parameters count as constants. Buffers are read from copies, so that nothing that writes into
    them during the call is kept.

    Args:
        under: path of the part of ``module`` that ``params`` are named in.
    """
    own = {name: value.detach() for name, value in module.named_parameters()}
    kept = {name: value.clone() for name, value in module.named_buffers()}
    prefix = f"{under}." if under else ""
    replaced = {f"{prefix}{name}": value for name, value in params.items()}
    return functional_call(module, {**own, **kept, **replaced}, given, named)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers of ``tensors`` in one vector [P]."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def split(vector: Tensor, params: Params) -> list[Tensor]:
    """The vector [P] in the shapes of ``params``."""
    parts = vector.split_with_sizes([value.numel() for value in params.values()])
    return [part.view_as(value) for part, value in zip(parts, params.values(), strict=True)]


def unrolled_step(loss: Tensor, params: Params, rate: float) -> dict[str, Tensor]:
    """``params - rate * d loss / d params``, with the graph of all that ``loss`` depends on.

    Args:
        loss: a scalar computed from ``params``.
        params: leaves that require a gradient.
        rate: size of the step, >= 0.
    """
    grads = _gradients(loss, params, graph=True)
    return {name: value - rate * grad for (name, value), grad in zip(params.items(), grads, strict=True)}


def gradient(losses: Losses, params: Params, data: Iterable[Batch]) -> Tensor:
    """Gradient [P] of the mean loss over ``data``, without a graph."""
    total, count = torch.zeros(()), 0
    for batch in data:
        items = losses(params, batch)
        total = total.to(items) + flat(_gradients(items.sum(), params))
        count += len(items)
    return total / count


def hessian_product(losses: Losses, params: Params, data: Iterable[Batch], vector: Tensor) -> Tensor:
    """Hessian of the mean loss over ``data`` times ``vector`` [P], without a graph.

    ``vector`` is detached first: a vector that itself depends on the parameters adds no terms.
    """
    direction, total, count = split(vector.detach(), params), torch.zeros_like(vector), 0
    for batch in data:
        items = losses(params, batch)
        slope = _dot(_gradients(items.sum(), params, graph=True), direction)
        total = total + flat(_gradients(slope, params))
        count += len(items)
    return total / count


def hessian(losses: Losses, params: Params, data: Iterable[Batch]) -> Tensor:
    """Hessian [P, P] of the mean loss over ``data``: P backward passes a batch, some at a time."""
    total, count = torch.zeros(()), 0
    for batch in data:
        items = losses(params, batch)
        grads = flat(_gradients(items.sum(), params, graph=True))
        units = torch.eye(len(grads)).to(grads)
        starts = range(0, len(grads), ROWS)
        total = total.to(items) + torch.cat([_rows(grads, params, units[s : s + ROWS]) for s in starts])
        count += len(items)
    return total / count


def slopes(losses: Losses, params: Params, data: Iterable[Batch], vector: Tensor) -> Tensor:
    """Product [n] of each sample's gradient with ``vector`` [P], in the order of ``data``.

    The derivative along ``vector`` by two backward passes, so that no gradient of a single sample is formed;
    a sample whose gradient is not finite spoils its own entry alone.
    """
    direction, found = split(vector.detach(), params), []
    for batch in data:
        items = losses(params, batch)
        share = torch.ones_like(items).requires_grad_()
        grads = torch.autograd.grad(
            items, list(params.values()), share, create_graph=True, materialize_grads=True
        )
        found.append(torch.autograd.grad(_dot(grads, direction), share)[0])
    return torch.cat(found)


# Inverses: (H + damping I)^-1 v


def solve(matrix: Tensor, vector: Tensor, damping: float) -> Tensor:
    """The exact solution [P] for a matrix [P, P], computed in float64."""
    damped = matrix.double() + damping * torch.eye(len(vector), dtype=torch.float64, device=vector.device)
    solution: Tensor = torch.linalg.solve(damped, vector.double())
    return solution.to(vector)


def conjugate_gradient(
    product: Product, vector: Tensor, damping: float, *, steps: int = 100, tolerance: float = 1e-6
) -> Tensor:
    """The solution [P] by at most ``steps`` products with the matrix.

    It ends early where the residual's norm falls below ``tolerance`` times that of ``vector``, or where the
    damped matrix bends the other way along a direction (its quadratic form is not positive): there the
    steps so far are returned, which is the truncated Newton method's rule.
    """
    solution, residual = torch.zeros_like(vector), vector.clone()
    direction, square = residual, residual @ residual
    enough = tolerance**2 * square
    for _ in range(steps):
        if square <= enough:
            break
        image = product(direction) + damping * direction
        bend = direction @ image
        if bend <= 0:
            break
        solution = solution + square / bend * direction
        residual = residual - square / bend * image
        square, before = residual @ residual, square
        direction = residual + square / before * direction
    return solution


def lissa(
    product: Product, vector: Tensor, damping: float, *, scale: float = 25.0, steps: int = 1000
) -> Tensor:
    """The solution [P] by a Neumann series: h <- v + (1 - damping / scale) h - H h / scale, and h / scale.

    ``product`` may be that of another batch at each step. The series converges where the largest eigenvalue
    of H + damping I is below 2 * scale.

    Differs: the released code calls damping / scale its damping and leaves out the last division.

    Raises:
        NonFiniteError: it diverges.

    Source: Agarwal et al. 2017 (LiSSA), as in Koh and Liang, ICML 2017, section 3.
    """
    found = vector.clone()
    for _ in range(steps):
        found = vector + (1 - damping / scale) * found - product(found) / scale
    if not torch.isfinite(found).all():
        raise NonFiniteError(f"lissa diverges with scale {scale}: raise it, or take the solver cg")
    return found / scale


def _gradients(of: Tensor, params: Params, *, graph: bool = False) -> tuple[Tensor, ...]:
    """Gradients of a scalar; zeros where it does not depend on a parameter."""
    return torch.autograd.grad(of, list(params.values()), create_graph=graph, materialize_grads=True)


def _rows(grads: Tensor, params: Params, units: Tensor) -> Tensor:
    """The rows [R, P] of the Hessian that ``units`` [R, P] name."""
    rows = torch.autograd.grad(
        grads, list(params.values()), units, retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    found = [
        value.new_zeros(len(units), value.numel()) if row is None else row.flatten(1)
        for row, value in zip(rows, params.values(), strict=True)
    ]
    return torch.cat(found, dim=1)


def _dot(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(some, others, strict=True)]).sum()
