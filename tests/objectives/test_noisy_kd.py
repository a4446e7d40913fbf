"""What must be true of distillation from disturbed logits."""

from __future__ import annotations

import pytest
import torch

from limbeck.contracts import Batch, Facts, Outputs, Progress
from limbeck.errors import ConfigError, ShapeError
from limbeck.objectives.kd import KD
from limbeck.objectives.noisy_kd import Disturbed, NoisyKD

BATCH = Batch(torch.empty(6, 0), torch.zeros(6).long(), torch.arange(6), torch.zeros(6).long())


def said(seed: int) -> Outputs:
    return Outputs(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)))


def built(seed: int = 0, **fields: float) -> Disturbed:
    module = NoisyKD(**fields).build(said(0), said(1), Facts(seed=seed))
    assert isinstance(module, Disturbed)
    return module


def loss(module: Disturbed, step: int = 0) -> torch.Tensor:
    return module(said(0), said(1), BATCH, Progress(step=step))["noisy_kd"]


def test_without_noise_it_is_kd_bit_for_bit() -> None:
    plain = KD(weight=1, temperature=2).terms(said(0), said(1), BATCH, Progress())["kd"]
    assert torch.equal(loss(built(temperature=2)), plain)


def test_noise_is_a_function_of_seed_and_step_alone() -> None:
    module = built(sigma=2)
    assert torch.equal(loss(module, 3), loss(built(sigma=2), 3))
    assert not torch.equal(loss(module, 3), loss(module, 4))
    assert not torch.equal(loss(module, 3), loss(built(seed=1, sigma=2), 3))


def test_noise_has_its_deviation_and_no_mean() -> None:
    logits = torch.zeros(200, 500)
    noise = built(sigma=5).disturbed(logits, Progress())
    assert float(noise.mean()) == pytest.approx(0, abs=0.1)
    assert float(noise.std()) == pytest.approx(5, rel=0.02)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="sigma is -1"):
        NoisyKD(sigma=-1)
    with pytest.raises(ShapeError, match="5 classes but the teacher has 4"):
        NoisyKD().build(said(0), Outputs(torch.zeros(6, 4)), Facts())
