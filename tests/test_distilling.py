"""``limbeck.distill``: plain modules, tensors, data sets and loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import limbeck
from limbeck.errors import ConfigError, DataError, GuardError, NonFiniteError, ShapeError


def net(width: int, classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, classes))


def data(count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=draws)
    return inputs, inputs[:, :3].argmax(1)


def distil(tmp_path: Path, teacher: nn.Module | None, student: nn.Module, train: Any, **more: Any) -> Any:
    given = {"epochs": 3, "batch_size": 20, "out": tmp_path / "run", "quiet": True} | more
    return limbeck.distill(teacher, student, train, **given)


class Pairs(Dataset[Any]):
    """A map-style data set; ``noise`` makes each reading another."""

    def __init__(self, noise: float = 0.0) -> None:
        self.inputs, self.labels = data()
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.inputs[place] + self.noise * torch.randn(6), int(self.labels[place])


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("measured", [True, False])
def test_the_student_learns_and_the_teacher_comes_back_as_it_was(tmp_path: Path, measured: bool) -> None:
    teacher, student = net(16), net(4, seed=1)
    before, start = weights(teacher), weights(student)
    teacher.train()
    result = distil(tmp_path, teacher, student, data(), test=data(30, 1) if measured else None)
    assert torch.equal(weights(teacher), before)
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert not torch.equal(weights(student), start)
    assert (result.folder / "report.html").exists()
    assert ("accuracy" in result.data["student"]) == measured
    assert (result.data["fidelity"] is not None) == measured


def test_tensors_a_data_set_and_a_loader_are_all_taken(tmp_path: Path) -> None:
    for name, train in (
        ("tensors", data()),
        ("set", Pairs()),
        ("loader", DataLoader(TensorDataset(*data()), batch_size=20, shuffle=True)),
    ):
        result = distil(tmp_path / name, net(16), net(4, seed=1), train, test=data(30, 1))
        assert 0 <= result.data["student"]["accuracy"] <= 100


def test_a_method_that_remembers_samples_takes_what_has_a_length(tmp_path: Path) -> None:
    crd = {"name": "crd", "negatives": 8, "student_tap": "0", "teacher_tap": "0"}
    for name, train in (("tensors", data()), ("set", Pairs())):
        result = distil(tmp_path / name, net(16), net(4, seed=1), train, objective=["labels", crd])
        assert (result.folder / "report.html").exists()
    with pytest.raises(ShapeError, match="it was told of none: give tensors or a data set, no loader"):
        loader = DataLoader(TensorDataset(*data()), batch_size=20)
        distil(tmp_path / "loader", net(16), net(4, seed=1), loader, objective=["labels", crd])


@pytest.mark.parametrize("shuffled", [True, False])
def test_the_same_call_gives_the_same_student(tmp_path: Path, shuffled: bool) -> None:
    seen = []
    for name in "ab":
        student = net(4, seed=1)
        loader = DataLoader(TensorDataset(*data()), batch_size=20, shuffle=shuffled)
        distil(tmp_path / name, net(16), student, loader)
        torch.rand(3)
        seen.append(weights(student))
    assert torch.equal(*seen)


def test_a_set_that_differs_each_time_must_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass fresh=True"):
        distil(tmp_path, net(16), net(4), Pairs(noise=0.1))
    distil(tmp_path, net(16), net(4), Pairs(noise=0.1), fresh=True)


def test_resume_wants_the_same_call(tmp_path: Path) -> None:
    distil(tmp_path, net(16), net(4), data())
    with pytest.raises(ConfigError, match="resume=True"):
        distil(tmp_path, net(16), net(4), data())
    with pytest.raises(ConfigError, match="another run than this call describes"):
        distil(tmp_path, net(16), net(4), data(), epochs=9, resume=True)
    distil(tmp_path, net(16), net(4), data(), resume=True)


@pytest.mark.parametrize(
    ("change", "error", "line"),
    [
        (
            {"train": (data()[0], data()[1] + 3)},
            DataError,
            "labels span 3..5 but the networks give 3",
        ),
        ({"train": (data()[0], data()[1] - 1)}, DataError, "label"),
        ({"teacher": net(16, classes=4)}, ShapeError, "the teacher has 4 classes and the student 3"),
        ({"objective": "kdd"}, ConfigError, "did you mean 'kd'"),
        ({"teacher": None}, ConfigError, "'kd' needs a teacher but teacher is none"),
        ({"student": net(4).requires_grad_(False)}, GuardError, "nothing in it learns"),
        ({"train": (data()[0] * float("nan"), data()[1])}, NonFiniteError, "the input data is not finite"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], line: str
) -> None:
    given: dict[str, Any] = {"teacher": net(16), "student": net(4), "train": data()} | change
    with pytest.raises(error, match=line) as found:
        distil(tmp_path, given.pop("teacher"), given.pop("student"), given.pop("train"), **given)
    assert "\n" not in str(found.value)


def test_a_gradient_that_is_not_finite_is_never_taken(tmp_path: Path) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 3))

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs @ self.weight).square().sqrt()

    student = Root()
    with pytest.raises(NonFiniteError, match="the gradient is nan"):
        distil(tmp_path, None, student, data(), objective="labels")
    assert torch.isfinite(student.weight).all()
