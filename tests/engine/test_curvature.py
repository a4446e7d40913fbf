"""Second derivatives against plain oracles: finite differences, torch's own Hessian, gradients one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from limbeck.contracts import Batch
from limbeck.engine import curvature
from limbeck.engine.curvature import Params
from limbeck.errors import NonFiniteError

DAMPING = 0.05


def batch(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    index = torch.arange(count)
    return Batch(inputs=inputs, labels=index % 3, index=index, view=0 * index)


DATA = [batch(5), batch(4, seed=1)]  # of different sizes: a mean of means would differ


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def losses_of(net: nn.Module) -> Any:
    def losses(params: Params, given: Batch) -> Tensor:
        return F.cross_entropy(curvature.call(net, params, given.inputs), given.labels, reduction="none")

    return losses


@pytest.fixture
def net() -> nn.Module:
    return network()


@pytest.fixture
def params(net: nn.Module) -> dict[str, Tensor]:
    return curvature.parameters_of(net)


def whole(net: nn.Module, params: Params) -> Tensor:
    """The Hessian by torch's own means, on all data at once."""

    def mean(vector: Tensor) -> Tensor:
        parts = dict(zip(params, curvature.split(vector, params), strict=True))
        logits = functional_call(net, parts, torch.cat([b.inputs for b in DATA]))
        return F.cross_entropy(logits, torch.cat([b.labels for b in DATA]))

    found: Tensor = torch.autograd.functional.hessian(mean, curvature.flat(params.values()).detach())
    return found


def test_hessian_and_its_products(net: nn.Module, params: dict[str, Tensor]) -> None:
    wanted = whole(net, params)
    vector = torch.randn(len(wanted), dtype=torch.float64)
    found = curvature.hessian(losses_of(net), params, DATA)
    product = curvature.hessian_product(losses_of(net), params, DATA, vector)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(product, wanted @ vector, rtol=1e-9, atol=1e-12)
    assert not found.requires_grad
    assert not product.requires_grad


def test_a_vector_that_depends_on_the_parameters_adds_no_terms(
    net: nn.Module, params: dict[str, Tensor]
) -> None:
    loss = losses_of(net)(params, DATA[0]).mean()
    vector = curvature.flat(torch.autograd.grad(loss, list(params.values()), create_graph=True))
    found = curvature.hessian_product(losses_of(net), params, DATA, vector)
    torch.testing.assert_close(found, whole(net, params) @ vector.detach(), rtol=1e-9, atol=1e-12)


def test_slopes_are_products_with_each_samples_own_gradient(
    net: nn.Module, params: dict[str, Tensor]
) -> None:
    def one(given: Params, inputs: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, given, inputs[None]), label[None])

    detached = {name: value.detach() for name, value in params.items()}
    vector = torch.randn(sum(p.numel() for p in params.values()), dtype=torch.float64)
    own = [vmap(grad(one), (None, 0, 0))(detached, b.inputs, b.labels) for b in DATA]
    rows = torch.cat([torch.cat([g.flatten(1) for g in each.values()], dim=1) for each in own])
    found = curvature.slopes(losses_of(net), params, DATA, vector)
    torch.testing.assert_close(found, rows @ vector, rtol=1e-9, atol=1e-12)
    mean = curvature.gradient(losses_of(net), params, DATA)
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_sample_without_a_finite_gradient_spoils_its_own_entry_alone(
    net: nn.Module, params: dict[str, Tensor], spoilt: float
) -> None:
    vector = torch.ones(sum(p.numel() for p in params.values()), dtype=torch.float64)
    sound = curvature.slopes(losses_of(net), params, [DATA[0]], vector)
    given = DATA[0].inputs.clone()
    given[2, 1] = spoilt
    bad = Batch(inputs=given, labels=DATA[0].labels, index=DATA[0].index, view=DATA[0].view)
    found = curvature.slopes(losses_of(net), params, [bad], vector)
    others = torch.arange(5) != 2
    torch.testing.assert_close(found[others], sound[others])
    assert not torch.isfinite(found[2])


def test_the_gradient_through_an_unrolled_step_is_that_of_finite_differences(
    net: nn.Module, params: dict[str, Tensor]
) -> None:
    def outer(weight: Tensor) -> Tensor:
        inner = (weight * losses_of(net)(params, DATA[0])).mean()
        after = curvature.unrolled_step(inner, params, 0.3)
        loss: Tensor = losses_of(net)(after, DATA[1]).mean()
        return loss

    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(outer(weight), weight)
    step = 1e-5
    wanted = torch.stack(
        [(outer(weight + step * unit) - outer(weight - step * unit)) / (2 * step) for unit in torch.eye(5)]
    )
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in net.parameters())


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """The Hessian of a linear softmax model and a vector."""
    linear = nn.Linear(4, 3).double()
    params = curvature.parameters_of(linear)
    matrix = curvature.hessian(losses_of(linear), params, DATA)
    return matrix, torch.randn(len(matrix), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_solvers_solve_the_damped_system_and_agree(problem: tuple[Tensor, Tensor]) -> None:
    matrix, vector = problem
    exact = curvature.solve(matrix, vector, DAMPING)
    assert (matrix @ exact + DAMPING * exact - vector).norm() < 1e-10
    for found in (
        curvature.conjugate_gradient(lambda v: matrix @ v, vector, DAMPING, tolerance=1e-10),
        curvature.lissa(lambda v: matrix @ v, vector, DAMPING, scale=2.0, steps=1000),
    ):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


def test_lissa_says_when_it_diverges(problem: tuple[Tensor, Tensor]) -> None:
    matrix, vector = problem
    with pytest.raises(NonFiniteError, match=r"lissa diverges with scale 0\.01: raise it"):
        curvature.lissa(lambda v: matrix @ v, vector, DAMPING, scale=0.01, steps=2000)


def test_conjugate_gradients_stop_where_the_matrix_bends_the_other_way() -> None:
    matrix, vector = torch.diag(torch.tensor([2.0, -1.0])), torch.tensor([1.0, 0.1])
    found = curvature.conjugate_gradient(lambda v: matrix @ v, vector, 0.01)
    assert torch.isfinite(found).all()
    zero = torch.zeros(2)
    assert torch.equal(curvature.conjugate_gradient(lambda v: matrix @ v, zero, 0.01), zero)


class Noisy(nn.Module):
    """Batch norm, dropout and attention: all that a second derivative can stumble on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.norm(inputs)[:, None, None, :]
        x = F.scaled_dot_product_attention(x, 2 * x, x)
        logits: Tensor = self.head(self.drop(x[:, 0, 0, :]))
        return logits


def test_a_step_at_rest_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    net = Noisy().double().train()
    net.drop.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    params, weight = curvature.parameters_of(net), torch.ones(5, dtype=torch.float64, requires_grad=True)
    with curvature.at_rest(net):
        first = (weight * losses_of(net)(params, DATA[0])).mean()
        again = (weight * losses_of(net)(params, DATA[0])).mean()
        after = curvature.unrolled_step(first, params, 0.1)
        outer = losses_of(net)(after, DATA[1]).mean()
    outer.backward()
    assert first.item() == again.item()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [part.training for part in net.modules()] == [True, True, False, True]


def test_only_what_is_given_is_derived(net: nn.Module) -> None:
    last = curvature.parameters_of(net, ["2.weight", "2.bias"])
    assert list(last) == ["2.weight", "2.bias"]
    part = curvature.hessian(losses_of(net), last, DATA)
    every = whole(net, curvature.parameters_of(net))
    torch.testing.assert_close(part, every[-len(part) :, -len(part) :], rtol=1e-9, atol=1e-12)
