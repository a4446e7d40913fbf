"""What a run leaves for others: weights that timm loads, an ONNX file that answers alike, and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.engine import small
from torch import nn

import limbeck
from limbeck import api, config, exporting, plain
from limbeck.contracts import Batch, Outputs
from limbeck.errors import ConfigError, DataError, GuardError
from limbeck.nets.small import MLP
from limbeck.nets.taps import Tapped, core
from limbeck.report.card import card
from limbeck.report.run import read_run

TIMM = "student={name: timm, model: resnet10t, model_args: {in_chans: 1, img_size: 32}}"
SHORT = ("scenario.epochs=1", "scenario.teacher_epochs=1")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small perceptron with a teacher."""
    folder = tmp_path_factory.mktemp("taught")
    sets = (*SHORT, f"engine.cache_root={folder / 'caches'}")
    return limbeck.run("kd", sets, out=folder / "run", quiet=True).folder


def asked(student: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = exporting.Answer(student)(images)
    return answer


def test_a_timm_student_is_loaded_by_timm(tmp_path: Path) -> None:
    import timm

    limbeck.run("static", (TIMM, *SHORT), out=tmp_path / "run", quiet=True)
    student = limbeck.load_student(tmp_path / "run")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'run' / 'student'}", pretrained=True).eval()
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(theirs(images), asked(student, images))
    assert theirs.pretrained_cfg["label_names"] == [str(c) for c in range(10)]
    text = (tmp_path / "run" / "student" / "README.md").read_text()
    assert 'timm.create_model("local-dir:student", pretrained=True)' in text


def test_an_onnx_file_answers_as_the_student(taught: Path) -> None:
    import onnxruntime

    written = limbeck.export(taught, onnx=True)
    assert written.onnx is not None
    assert written.onnx["difference"] < 1e-4
    assert written.onnx["samples"] == exporting.CHECKED
    assert json.loads((taught / "student" / "onnx.json").read_text()) == written.onnx
    images = exporting.test_images(config.load(taught / "recipe.yaml"), 7)
    session = onnxruntime.InferenceSession(taught / "student" / "model.onnx")
    (said,) = session.run(None, {"input": images.numpy()})
    np.testing.assert_allclose(said, asked(limbeck.load_student(taught), images).numpy(), atol=1e-4)
    assert f"{written.onnx['difference']:.1e}" in written.card.read_text()


def test_a_prompted_transformer_exports_what_it_predicts(tmp_path: Path) -> None:
    """Query, prompts and both heads are in the file."""
    recipe = tmp_path / "small.yaml"
    recipe.write_text(plain.write(small.given(tmp_path, "scenario.epochs=1")))
    folder = limbeck.run(recipe, out=tmp_path / "run", quiet=True).folder
    written = limbeck.export(folder, onnx=True)
    assert written.onnx is not None
    assert written.onnx["difference"] < 1e-4
    text = written.card.read_text()
    assert "| average accuracy |" in text
    assert "limbeck.load_student" in text


class TwoHeads(Tapped):
    """A network with something learnt beside ``network``."""

    def __init__(self) -> None:
        super().__init__(MLP(4, [3], 2))
        self.second = nn.Linear(2, 2)

    def forward(self, batch: Batch, taps: Any = (), teacher: Any = None) -> Outputs:
        said = super().forward(batch, taps, teacher)
        return Outputs(logits=said.logits, soft_logits=self.second(said.logits))

    def predict(self, outputs: Outputs) -> torch.Tensor:
        return outputs.logits + outputs.soft


def test_nothing_that_was_learnt_is_left_out() -> None:
    wrapped, single = TwoHeads(), Tapped(MLP(4, [3], 2))
    assert core(wrapped) is wrapped
    assert core(single) is single.network


def test_a_wrapped_student_exports_its_own_answer(tmp_path: Path) -> None:
    student = TwoHeads().eval()
    images = torch.randn(9, 1, 2, 2)
    found = exporting.to_onnx(exporting.Answer(student), images, tmp_path / "model.onnx")
    assert found.samples == 9
    assert found.difference < 1e-5
    assert found.scale == pytest.approx(float(asked(student, images).abs().max()))


class Fickle(nn.Module):
    """Answers otherwise each time it is asked."""

    asked = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return images.flatten(1) * self.asked


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="answers otherwise than the student, by up to"):
        exporting.to_onnx(Fickle(), torch.ones(4, 1, 2, 2), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_one_line_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.ones(4, 1, 2, 2)
    with pytest.raises(DataError, match="give at least 2"):
        exporting.to_onnx(nn.Flatten(), images[:1], tmp_path / "model.onnx")
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ConfigError, match=r"ONNX needs onnxscript, .*: pip install 'limbeck\[export\]'"):
        exporting.to_onnx(nn.Flatten(), images, tmp_path / "model.onnx")


def test_a_student_from_python_is_exported_with_its_inputs(tmp_path: Path) -> None:
    inputs = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    student = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    given = (inputs, inputs[:, :3].argmax(1))
    run = limbeck.distill(
        None, student, given, objective="labels", epochs=1, out=tmp_path / "run", quiet=True
    )
    with pytest.raises(ConfigError, match="examples is not given"):
        api.export(run.folder, onnx=True, student=student)
    written = api.export(run.folder, onnx=True, student=student, examples=inputs)
    assert written.onnx is not None
    assert written.onnx["samples"] == 30
    text = written.card.read_text()
    assert "Nothing was measured: the run had no test data." in text
    assert "None: the student learnt from the labels alone." in text
    assert "network.load_state_dict(load_file(" in text


def test_the_card_says_what_the_run_says(taught: Path) -> None:
    text = card(read_run(taught))
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "image-classification"
    result = json.loads((taught / "result.json").read_text())
    low, high = result["student"]["accuracy_interval"]
    row = f"| accuracy | {result['student']['accuracy']:.1f} % | {low:.1f} to {high:.1f} |"
    assert row in text
    assert "licence of the data, as its source states it: BSD-3-Clause" in text
    assert "`trained mlp`" in text
    assert "kd (weight 0.9, temperature 4.0)" in text
    assert "values in 0..1, minus [0.5], over [0.5]" in text
