"""Self-distillation of kernel ridge regression in closed form, and the best weight of the true targets.

n training points, m outputs; K [n, n] the kernel between them, lambda > 0 the ridge. ``alpha`` weighs the
TRUE targets, the other way round than in KD. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.errors import ConfigError

TINY = 1e-24  # squared distance, relative to the predictions', under which two predictions are one


def rbf(one: Tensor, other: Tensor, gamma: float) -> Tensor:
    """exp(-gamma ‖x - z‖²) between the rows of [n, d] and [m, d]: [n, m]."""
    return torch.exp(-gamma * torch.cdist(one.double(), other.double()).square())


@dataclass(frozen=True)
class Spectrum:
    """K = V diag(d) Vᵀ, taken apart once for all steps, weights and ridges.

    Attributes:
        values: d [n], largest first, not below 0.
        vectors: V [n, n].
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, kernel: Tensor) -> Spectrum:
        """The spectrum of a symmetric kernel matrix [n, n]."""
        values, vectors = torch.linalg.eigh(kernel.double())
        return cls(values.flip(0).clamp(min=0), vectors.flip(1))

    def dual(self, target: Tensor, ridge: float) -> Tensor:
        """(K + lambda I)⁻¹ z for a target [n, m]: what k(x, X) [p, n] turns into predictions [p, m]."""
        return self.vectors @ ((self.vectors.T @ target.double()) / (self.values + ridge)[:, None])

    def fit(self, target: Tensor, ridge: float) -> Tensor:
        """K (K + lambda I)⁻¹ z: the fit at the training points [n, m]."""
        return self.filtered(shrinkage(self.values, ridge), target)

    def filtered(self, filter: Tensor, target: Tensor) -> Tensor:
        """V diag(b) Vᵀ y for a filter b [n]."""
        return self.vectors @ (filter[:, None] * (self.vectors.T @ target.double()))


@dataclass(frozen=True)
class Steps:
    """All steps of self-distillation.

    Attributes:
        targets: z_t [T, n, m].
        fits: y^(t) at the training points [T, n, m].
        duals: (K + lambda I)⁻¹ z_t [T, n, m]; ``k(x, X) @ duals[t]`` predicts at new points.
    """

    targets: Tensor
    fits: Tensor
    duals: Tensor


def shrinkage(values: Tensor, ridge: float) -> Tensor:
    """a_k = d_k / (d_k + lambda), in [0, 1)."""
    if not ridge > 0:
        raise ConfigError(f"ridge is {ridge}: allowed are values above 0")
    return values / (values + ridge)


def filters(values: Tensor, ridge: float, alphas: Sequence[float]) -> Tensor:
    """The filters b^(t) of all steps [T, n]: b^(0) = 1, b_k^(t) = a_k ((1 - alpha_t) b_k^(t-1) + alpha_t).

    The first step is the plain fit whatever alpha_1 is.

    Source: Borup & Andersen, NeurIPS 2021 (arXiv 2102.13088), section 4.
    """
    a = shrinkage(values, ridge)
    found, b = [], torch.ones_like(a)
    for alpha in alphas:
        b = a * ((1 - alpha) * b + alpha)
        found.append(b)
    return torch.stack(found)


def limit_filter(values: Tensor, ridge: float, alpha: float) -> Tensor:
    """Where b^(t) goes for a constant alpha: alpha d / (alpha d + lambda), that of a ridge lambda / alpha.

    With alpha 0 that is 0: the fits collapse.
    """
    if not ridge > 0:
        raise ConfigError(f"ridge is {ridge}: allowed are values above 0")
    return alpha * values / (alpha * values + ridge)


def weighted_steps(spectrum: Spectrum, target: Tensor, ridge: float, alphas: Sequence[float]) -> Steps:
    """Fit z_t = alpha_t y + (1 - alpha_t) y^(t-1) again and again, with y^(0) = y.

    Args:
        spectrum: of the kernel [n, n].
        target: y [n, m].
        ridge: lambda > 0.
        alphas: the weight of the true targets in each step, in [0, 1].

    Raises:
        ConfigError: ``ridge`` is not above 0.

    Source: Borup & Andersen, NeurIPS 2021 (arXiv 2102.13088), sections 3 and 4.
    """
    true = target.double()
    fit, targets, fits, duals = true, [], [], []
    for alpha in alphas:
        mixed = alpha * true + (1 - alpha) * fit
        fit = spectrum.fit(mixed, ridge)
        targets.append(mixed)
        fits.append(fit)
        duals.append(spectrum.dual(mixed, ridge))
    return Steps(torch.stack(targets), torch.stack(fits), torch.stack(duals))


def krr_self_distill(spectrum: Spectrum, target: Tensor, ridge: float, alpha: float, steps: int) -> Steps:
    """``weighted_steps`` with one alpha for all steps."""
    return weighted_steps(spectrum, target, ridge, [alpha] * steps)


def limit_dual(spectrum: Spectrum, target: Tensor, ridge: float, alpha: float) -> Tensor:
    """The duals [n, m] of the limit: alpha (alpha K + lambda I)⁻¹ y; zeros for alpha 0."""
    scale = alpha / (alpha * spectrum.values + ridge)
    return spectrum.filtered(scale, target)


@dataclass(frozen=True)
class OptimalAlpha:
    """The weight of the true targets that fits the validation samples best.

    Attributes:
        alpha: clipped to [0, 1], for use.
        raw: the minimiser itself, which may lie far outside; 1 where any weight gives the same.
        denominator: ‖p_gt - p_kd‖²: how much the two predictions differ; a small one makes ``raw`` unsure.
        defined: whether they differ at all.
    """

    alpha: float
    raw: float
    denominator: float
    defined: bool


def optimal_alpha(from_labels: Tensor, from_teacher: Tensor, target: Tensor) -> OptimalAlpha:
    """<y - p_kd, p_gt - p_kd> / ‖p_gt - p_kd‖², which minimises ‖y - alpha p_gt - (1 - alpha) p_kd‖².

    Exact in kernel ridge, where predictions are linear in the target; an estimate for networks. All outputs
    share the one alpha.

    Args:
        from_labels: p_gt, validation predictions of the fit on the labels alone, [N, m].
        from_teacher: p_kd, those of the fit on the previous step's answers alone.
        target: the true targets y of the validation samples.

    Source: Borup & Andersen, NeurIPS 2021 (arXiv 2102.13088), section 4.3.
    Differs: clipped for use; with equal predictions alpha is 1.
    """
    p_gt, p_kd, y = (x.double().flatten() for x in (from_labels, from_teacher, target))
    apart = p_gt - p_kd
    denominator = float(apart @ apart)
    if denominator <= TINY * float(p_gt @ p_gt):
        return OptimalAlpha(1.0, 1.0, denominator, False)
    raw = float((y - p_kd) @ apart) / denominator
    return OptimalAlpha(min(max(raw, 0.0), 1.0), raw, denominator, True)
