"""What must be true of self-distillation, in closed form and of networks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine import small
from tests.engine.killing import killed_and_resumed
from torch import Tensor

from limbeck import api, config
from limbeck.contracts import Batch, Outputs, Progress
from limbeck.engine.distillation import Distillation
from limbeck.errors import ConfigError
from limbeck.metrics import cost, kernel_ridge
from limbeck.metrics.kernel_ridge import Spectrum, filters, limit_filter, optimal_alpha, rbf, shrinkage
from limbeck.objectives.probability_mse import ProbabilityMSE
from limbeck.report.compare import compare
from limbeck.scenarios.kernel_self_distillation import KernelSelfDistillation
from limbeck.scenarios.self_distillation import NormSum, SelfDistillation

SMALL = ("scenario.epochs=2", "student.hidden=[8]", "data.data.test_fraction=0.8", "engine.threads=1")

# Borup & Andersen's notebook: sin(2 pi x) with noise at 0, 0.1, ..., 1.
NOISY = (
    0.3847663608, 1.2333967683, 1.3323224233, 0.6920159497, -0.2975614618, -0.2418928947, -0.7964485795,
    -0.9616480182, -0.4967250976, -0.3469065952, 0.5589512673,
)  # fmt: skip
TOY = {
    0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505),
    0.25: (0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011, 0.15250),
    0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959),
}

seeds = st.integers(0, 10**6)
alphas = st.lists(st.floats(0, 1), min_size=1, max_size=6)


def problem(seed: int, n: int = 9, outputs: int = 2) -> tuple[Tensor, Spectrum, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (3, outputs))
    kernel = rbf(x, x, 0.5)
    return kernel, Spectrum.of(kernel), y


# The closed forms


@pytest.mark.parametrize("alpha", TOY)
def test_the_papers_toy_to_five_digits(alpha: float) -> None:
    x, new = torch.arange(11)[:, None] / 10, torch.arange(101, dtype=torch.float64)[:, None] / 100
    truth, y = torch.sin(2 * math.pi * new), torch.tensor(NOISY, dtype=torch.float64)[:, None]
    spectrum, cross = Spectrum.of(rbf(x.double(), x.double(), 80)), rbf(new, x.double(), 80)
    steps = kernel_ridge.krr_self_distill(spectrum, y, 0.2, alpha, 6)
    duals = [*steps.duals, kernel_ridge.limit_dual(spectrum, y, 0.2, alpha)]
    errors = [(cross @ dual - truth).square().mean().item() for dual in duals]
    assert [round(error, 5) for error in errors] == list(TOY[alpha])


@given(seeds, st.floats(0.01, 5), alphas)
def test_recursion_spectrum_and_refits_agree(seed: int, ridge: float, given_alphas: list[float]) -> None:
    kernel, spectrum, y = problem(seed)
    steps = kernel_ridge.weighted_steps(spectrum, y, ridge, given_alphas)
    fit = y
    for step, (alpha, b) in enumerate(
        zip(given_alphas, filters(spectrum.values, ridge, given_alphas), strict=True)
    ):
        target = alpha * y + (1 - alpha) * fit
        fit = kernel @ torch.linalg.solve(kernel + ridge * torch.eye(9, dtype=torch.float64), target)
        torch.testing.assert_close(steps.fits[step], fit, rtol=0, atol=1e-10)
        torch.testing.assert_close(spectrum.filtered(b, y), fit, rtol=0, atol=1e-10)


@given(seeds, st.floats(0.01, 5))
def test_the_ends_of_alpha(seed: int, ridge: float) -> None:
    _, spectrum, y = problem(seed)
    same = kernel_ridge.krr_self_distill(spectrum, y, ridge, 1.0, 4).fits
    torch.testing.assert_close(same, same[:1].expand_as(same))
    norms = kernel_ridge.krr_self_distill(spectrum, y, ridge, 0.0, 8).fits.flatten(1).norm(dim=1)
    assert (norms[1:] < norms[:-1]).all()
    powers = filters(spectrum.values, ridge, [0.0] * 50)
    torch.testing.assert_close(powers[-1], shrinkage(spectrum.values, ridge) ** 50)
    assert not limit_filter(spectrum.values, ridge, 0.0).any()


@given(seeds, st.floats(0.05, 5), st.floats(0.05, 1))
def test_the_limit_is_ridge_with_more_ridge(seed: int, ridge: float, alpha: float) -> None:
    _, spectrum, y = problem(seed)
    limit = limit_filter(spectrum.values, ridge, alpha)
    torch.testing.assert_close(limit, shrinkage(spectrum.values, ridge / alpha))
    dual = kernel_ridge.limit_dual(spectrum, y, ridge, alpha)
    torch.testing.assert_close(dual, spectrum.dual(y, ridge / alpha))
    b = filters(spectrum.values, ridge, [alpha] * 8)
    away = (b - limit).norm(dim=1)
    rate = (1 - alpha) * shrinkage(spectrum.values, ridge).max()
    assert (away[1:] <= rate * away[:-1] + 1e-12).all()


@given(seeds, st.floats(0.05, 5), st.floats(0, 0.99))
def test_filters_fall_and_keep_the_order_of_the_eigenvalues(seed: int, ridge: float, alpha: float) -> None:
    _, spectrum, _ = problem(seed)
    b = filters(spectrum.values, ridge, [alpha] * 6)
    assert ((b >= 0) & (b <= 1)).all()
    assert (b[1:] <= b[:-1] + 1e-15).all()
    assert (b[:, 1:] <= b[:, :-1] + 1e-15).all()


@given(seeds)
def test_the_best_alpha(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p_gt, p_kd, y = torch.randn(3, 7, 2, generator=generator, dtype=torch.float64)

    def error(alpha: float) -> float:
        return float((y - alpha * p_gt - (1 - alpha) * p_kd).square().sum())

    found = optimal_alpha(p_gt, p_kd, y)
    assert found.defined and found.denominator > 0
    assert error(found.raw) <= min(error(0), error(1), error(found.raw + 1e-3), error(found.raw - 1e-3))
    assert 0 <= found.alpha <= 1
    assert optimal_alpha(p_gt, p_kd, p_gt).raw == pytest.approx(1)
    assert optimal_alpha(p_gt, p_kd, p_kd).raw == pytest.approx(0)
    assert optimal_alpha(7 * p_gt, 7 * p_kd, 7 * y).raw == pytest.approx(found.raw)


def test_equal_predictions_give_one_and_say_so() -> None:
    p = torch.rand(5, 2)
    found = optimal_alpha(p, p, torch.rand(5, 2))
    assert (found.alpha, found.raw, found.defined) == (1.0, 1.0, False)


@given(seeds, alphas)
def test_fits_are_linear_in_the_targets_and_columns_are_apart(seed: int, given_alphas: list[float]) -> None:
    _, spectrum, y = problem(seed)
    both = kernel_ridge.weighted_steps(spectrum, y, 0.3, given_alphas).fits
    torch.testing.assert_close(kernel_ridge.weighted_steps(spectrum, 5 * y, 0.3, given_alphas).fits, 5 * both)
    one = kernel_ridge.weighted_steps(spectrum, y[:, :1], 0.3, given_alphas).fits
    torch.testing.assert_close(one, both[:, :, :1])


@given(seeds, alphas)
def test_without_a_ridge_every_step_interpolates(seed: int, given_alphas: list[float]) -> None:
    _, spectrum, y = problem(seed, n=5)
    fits = kernel_ridge.weighted_steps(spectrum, y, 1e-12, given_alphas).fits
    torch.testing.assert_close(fits, y.expand_as(fits), rtol=0, atol=1e-6)


def test_a_ridge_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="ridge is 0"):
        kernel_ridge.weighted_steps(problem(0)[1], problem(0)[2], 0.0, [1.0])


# The objective


def test_the_squared_error_of_probabilities() -> None:
    own, other = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1])
    batch = Batch(
        own, labels, torch.arange(4), torch.zeros(4).long(), labelled=torch.tensor([1, 1, 0, 1]).bool()
    )
    hard = ProbabilityMSE(target="labels").terms(Outputs(own), Outputs(other), batch, Progress())["labels"]
    wanted = torch.nn.functional.one_hot(labels, 3).float()
    seen = [0, 1, 3]
    torch.testing.assert_close(hard, (own.softmax(1) - wanted)[seen].square().mean())
    soft = ProbabilityMSE(weight=2).terms(Outputs(own), Outputs(other), batch, Progress())["teacher"]
    torch.testing.assert_close(soft, 2 * (own.softmax(1) - other.softmax(1)).square().mean())


def test_the_sum_of_norms() -> None:
    net = torch.nn.Linear(3, 2)
    found = NormSum(net, 0.1)(Outputs(torch.zeros(1, 2)), None, None, None)["norms"]  # type: ignore[arg-type]
    torch.testing.assert_close(found, 0.1 * (net.weight.norm() + net.bias.norm()))


# Networks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


def run(place: Path, name: str, *sets: str, own: str = "self-distillation") -> Path:
    api.run(
        own, [*SMALL, f"engine.cache_root={place / 'caches'}", *sets], seed=1, out=place / name, quiet=True
    )
    return place / name


def weights(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def test_with_alpha_one_the_teacher_is_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[Any] = []
    plain = Distillation.taught

    def watched(self: Distillation, batch: Batch) -> Outputs | None:
        taught.append(found := plain(self, batch))
        return found

    monkeypatch.setattr(Distillation, "taught", watched)
    run(tmp_path, "one", "scenario.alpha=1", "scenario.generations=3")
    assert taught and all(found is None for found in taught)


def test_with_alpha_zero_labels_count_in_the_first_generation_alone(tmp_path: Path) -> None:
    run(tmp_path, "alone", "scenario.alpha=0", "scenario.generations=3")
    steps = [line for line in small.lines(tmp_path / "alone") if line["event"] == "step"]
    named = {line["stage"]: set(line["terms"]) for line in steps}
    assert named == {
        "generation-1": {"probability_mse.labels"},
        "generation-2": {"probability_mse2.teacher"},
        "generation-3": {"probability_mse2.teacher"},
    }


def test_every_generation_starts_afresh(tmp_path: Path) -> None:
    """With alpha 1 none learns from another, so they differ by their start alone."""
    three = run(tmp_path, "three", "scenario.alpha=1", "scenario.generations=3")
    two = run(tmp_path, "two", "scenario.alpha=1", "scenario.generations=2")
    lines = [json.loads((f / "result.json").read_text())["generations"] for f in (three, two)]
    assert lines[0][:2] == lines[1]
    assert weights(three) != weights(two)


def test_the_best_alpha_is_chosen_on_held_out_samples_with_one_more_training(tmp_path: Path) -> None:
    found = json.loads((run(tmp_path, "best", "scenario.generations=3") / "result.json").read_text())
    assert list(found["time"]["stages"]) == [
        "generation-1", "generation-2-alone", "generation-2", "generation-3-alone", "generation-3",
    ]  # fmt: skip
    assert found["protocol"]["validation_samples"] > 0
    for line in found["generations"][1:]:
        chosen = line["chosen"]
        assert line["alpha"] == chosen["alpha"] == min(max(chosen["raw"], 0), 1)
        assert chosen["denominator"] > 0
    assert found["student"]["squared_error"] == pytest.approx(found["student"]["brier"], abs=1e-5)


@pytest.mark.parametrize("at", [4, 25, 45, 60])
def test_killed_and_resumed(at: int, tmp_path: Path) -> None:
    few = [*SMALL, "scenario.epochs=3", "scenario.generations=3", f"engine.cache_root={tmp_path / 'caches'}"]
    asked = config.load("self-distillation", [*few, "engine.checkpoint_seconds=0"])
    api.run(asked, out=tmp_path / "whole", quiet=True)
    small.assert_same(killed_and_resumed(asked, tmp_path / "killed", at=at), tmp_path / "whole")


def test_the_page_and_the_comparison_work(tmp_path: Path) -> None:
    kernel = ("student.gamma=0.1", "data.data.test_fraction=0.8")
    folders = [
        run(
            tmp_path,
            "deep",
            "scenario.alpha=[0.5, 0.2]",
            "scenario.generations=3",
            "scenario.norm_penalty=0.001",
        )
    ]
    folders += [run(tmp_path, "once", own="self-distillation-once")]
    for alpha in ("optimal", "0"):
        sets = [*kernel, "engine.threads=1", f"scenario.alpha={alpha}"]
        api.run("self-distillation-kernel", sets, seed=1, out=tmp_path / f"kernel-{alpha}", quiet=True)
        folders.append(tmp_path / f"kernel-{alpha}")
    assert all("squared error" in (folder / "report.html").read_text() for folder in folders)
    for two in (folders[:2], folders[2:]):
        found = compare(two, baseline=None).data
        assert "student.squared_error" in found["figures"]
        assert len(found["methods"]) == 2


def test_the_kernel_machine_comes_back(tmp_path: Path) -> None:
    sets = ["data.data.test_fraction=0.8", "engine.threads=1", "scenario.generations=3"]
    found = api.run("self-distillation-kernel", sets, seed=2, out=tmp_path / "run", quiet=True).data
    machine = api.load_student(tmp_path / "run")
    test = config.load("self-distillation-kernel", sets).data.seeded(2).load().test
    images = torch.from_numpy(test.images).permute(0, 3, 1, 2).float() / 255
    none = torch.zeros(len(images)).long()
    said = machine.predict(machine(Batch(images, none, none, none))).argmax(1)
    assert 100 * (said == test.labels).double().mean().item() == pytest.approx(found["student"]["accuracy"])
    assert [line["generation"] for line in found["generations"]] == [1, 2, 3]
    assert found["generations"][1]["chosen"]["defined"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("teacher={name: trained, network: {name: mlp}}",), "set teacher to none"),
        (("selector={name: random}",), "leave selector out"),
        (("scenario.validation=0",), "alpha is optimal but scenario.validation is 0"),
        (("objective=[{name: probability_mse}]",), "no objective reads the labels"),
        (("objective=[labels]",), "no objective listens to the generation before"),
        (("data={name: part, data: digits, labelled: 4}",), "alpha is optimal, chosen by the labels of held"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(sets: tuple[str, ...], message: str) -> None:
    recipe = config.load("self-distillation", sets)
    with pytest.raises(ConfigError, match=message):
        recipe.scenario.check(recipe)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("student={name: mlp}",), "choose that, or scenario self_distillation"),
        (("objective=[labels]",), "give objective probability_mse alone"),
        (
            ("scenario.alpha=0.5", "data={name: part, data: digits, labelled: 4}"),
            r"fits every label but the data hides some: leave data\.labelled out",
        ),
    ],
)
def test_the_kernel_asks_for_its_own(sets: tuple[str, ...], message: str) -> None:
    recipe = config.load("self-distillation-kernel", sets)
    with pytest.raises(ConfigError, match=message):
        recipe.scenario.check(recipe)


@pytest.mark.parametrize("scenario", [SelfDistillation, KernelSelfDistillation])
@pytest.mark.parametrize(
    "fields", [{"alpha": 1.5}, {"alpha": (0.5,)}, {"alpha": (0.1, 0.2, 2.0)}, {"generations": 0}]
)
def test_wrong_fields_are_refused(scenario: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        scenario(**{"generations": 4} | fields)
