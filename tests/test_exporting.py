"""What a run leaves for others: weights that timm loads, an ONNX file that answers alike, and a card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.engine import small, small_texts
from torch import nn

import limbeck
from limbeck import api, config, exporting, plain
from limbeck.contracts import Batch, Outputs
from limbeck.errors import CheckpointError, ConfigError, DataError, GuardError
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


def test_a_damaged_student_gets_no_card(taught: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(taught, folder)
    weights = folder / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        api.export(folder)
    with pytest.raises(ConfigError, match="there is no such folder"):
        api.load_student(tmp_path / "nowhere")


def test_an_onnx_file_answers_as_the_student(taught: Path) -> None:
    import onnxruntime

    written = limbeck.export(taught, int8=True)
    assert written.onnx is not None and written.int8 is not None
    assert written.onnx["difference"] < 1e-4
    assert written.onnx["samples"] == exporting.CHECKED
    assert json.loads((taught / "student" / "onnx.json").read_text()) == written.onnx
    images = exporting.test_inputs(config.load(taught / "recipe.yaml"), 7)
    session = onnxruntime.InferenceSession(taught / "student" / "model.onnx")
    (said,) = session.run(None, {"input": images.numpy()})
    np.testing.assert_allclose(said, asked(limbeck.load_student(taught), images).numpy(), atol=1e-4)
    assert f"{written.onnx['difference']:.1e}" in written.card.read_text()
    result, int8 = json.loads((taught / "result.json").read_text()), written.int8
    assert json.loads((taught / "student" / "int8.json").read_text()) == int8
    assert int8["float"]["accuracy"] == pytest.approx(result["student"]["accuracy"])
    assert int8["float"]["nll"] == pytest.approx(result["student"]["nll"], rel=1e-4)
    assert int8["samples"] == 450
    session = onnxruntime.InferenceSession(taught / "student" / "model.int8.onnx")
    data = config.load(taught / "recipe.yaml").data.seeded(0).load().test
    images = exporting.test_inputs(config.load(taught / "recipe.yaml"), 450)
    (said,) = session.run(None, {"input": images.numpy()})
    assert int8["int8"]["accuracy"] == pytest.approx(100 * np.mean(said.argmax(1) == data.labels.numpy()))
    assert int8["bytes"] < int8["float_bytes"] == written.onnx["bytes"]
    told = f"accuracy {int8['int8']['accuracy']:.1f} % against {int8['float']['accuracy']:.1f} %"
    assert told in written.card.read_text()


def test_a_language_model_is_written_for_any_number_and_length_of_texts(tmp_path: Path) -> None:
    """What is measured on the file, document by document, is what the run measured on packed rows."""
    import onnxruntime

    sets = ("scenario.epochs=1", "data.pack=true", "scenario.eval_rows=9")
    folder = limbeck.run(small_texts.recipe(tmp_path, *sets), out=tmp_path / "run", quiet=True).folder
    written = limbeck.export(folder, int8=True)
    assert written.onnx is not None and written.int8 is not None
    assert written.onnx["difference"] < 1e-4
    figures = json.loads((folder / "result.json").read_text())
    assert written.int8["float"]["perplexity"] == pytest.approx(figures["student"]["perplexity"], rel=1e-4)
    assert written.int8["float"]["accuracy"] == pytest.approx(figures["student"]["accuracy"])
    assert written.int8["int8"]["perplexity"] == pytest.approx(figures["student"]["perplexity"], rel=0.1)
    model, student = folder / "student" / "model.onnx", limbeck.load_student(folder)
    session = onnxruntime.InferenceSession(model)
    for shape in ((1, 1), (3, 5), (2, 70)):
        ids = torch.randint(9, shape, generator=torch.Generator().manual_seed(0))
        (said,) = session.run(None, {"input_ids": ids.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(said, student.network(input_ids=ids).logits.numpy(), atol=1e-4)
    text = written.card.read_text()
    assert '{"input_ids": inputs}' in text
    assert f"against {written.int8['float']['perplexity']:.3f}" in text


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
    assert "timm loads that backbone, but knows" in text


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


def spoilt(given: Path, to: Path, **_: Any) -> None:
    """In the place of quantisation: weights that are no numbers."""
    import onnx

    model = onnx.load(given)
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype == np.float32:
            weight.CopyFrom(onnx.numpy_helper.from_array(values * np.float32("nan"), weight.name))
    onnx.save(model, to)


def test_a_quantised_file_that_fails_does_not_replace_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime import quantization

    images = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    exporting.to_onnx(MLP(4, [8], 3).eval(), images, tmp_path / "model.onnx")
    good = exporting.to_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", [(images, None)])
    monkeypatch.setattr(quantization, "quantize_dynamic", spoilt)
    with pytest.raises(GuardError, match="no numbers: it was not kept"):
        exporting.to_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", [(images, None)])
    assert exporting.described(tmp_path / "int8.onnx").items() <= good.items()
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"model.onnx cannot be quantised \(.*: use it as it is"):
        exporting.to_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", [(images, None)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "model.onnx"]


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
    written = api.export(
        run.folder, int8=True, student=student, examples=inputs, labels=inputs[:, :3].argmax(1)
    )
    assert written.onnx is not None and written.int8 is not None
    assert 0 < written.int8["float"]["accuracy"] <= 100
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
    row = f"| accuracy | {result['student']['accuracy']:.1f} % | {low:.1f} to {high:.1f} % |"
    assert row in text
    assert "licence of the data, as its source states it: BSD-3-Clause" in text
    assert "`trained mlp`" in text
    assert "kd (weight 0.9, temperature 4.0)" in text
    assert "values in 0..1, minus `[0.5]`, over `[0.5]`" in text
