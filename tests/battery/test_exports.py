"""What every student must leave for other libraries: a new file in ``students/`` is tested at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.battery.networks import SPEC, TEXT, batch, build, example, reads_text, seeded

from limbeck import exporting, registry
from limbeck.api import save_student
from limbeck.contracts import Net
from limbeck.errors import ConfigError
from limbeck.nets.causal_lm import CausalLM
from limbeck.nets.language_models import the_library
from limbeck.nets.taps import Tapped

REFUSED = {"kernel_ridge": "cannot be written as ONNX"}  # float64 distances, which ONNX lacks
CLOSE = 1e-5  # of logits that are up to 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def students(text: bool) -> list[str]:
    return [n for n in registry.names("students") if reads_text(registry.get("students", n)) == text]


@pytest.mark.parametrize("name", students(text=False))
def test_onnxruntime_answers_as_a_student_of_images(name: str, folder: Path) -> None:
    net = exporting.answering(build(example("students", name, folder)).eval())
    images = batch(count=8).inputs
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name]):
            exporting.to_onnx(net, images, folder / "none.onnx")
        return
    found = exporting.to_onnx(net, images, folder / f"{name}.onnx")
    assert found.difference < CLOSE and found.scale > 0.01
    shrunk = exporting.to_int8(folder / f"{name}.onnx", folder / f"{name}.int8.onnx", [(images, None)])
    assert shrunk["samples"] == 8 and shrunk["difference"] < 0.1 * max(found.scale, 1)


@pytest.mark.parametrize("name", students(text=False))
def test_timm_answers_as_a_student_that_came_from_it(name: str, folder: Path) -> None:
    import timm

    net = build(example("students", name, folder)).eval()
    about: dict[str, Any] | None = getattr(net, "description", None)
    if about is None:
        pytest.skip("it is no network of timm, or more than one")
    save_student(folder / name, net, about)
    place, args = folder / name / "student", about["model_args"]
    theirs = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    blank = timm.create_model(
        about["architecture"],
        num_classes=SPEC.classes,
        checkpoint_path=str(place / "model.safetensors"),
        **args,
    ).eval()
    images = batch().inputs
    with torch.no_grad():
        own = exporting.Answer(net)(images)
        assert torch.equal(theirs(images), own) and torch.equal(blank(images), own)
        assert isinstance(net, Tapped)
        assert torch.equal(theirs.forward_features(images), net.network.forward_features(images))  # type: ignore[operator]


def models(name: str, folder: Path) -> dict[str, Net]:
    """A student's networks, by the folder that each is saved to."""
    net = build(example("students", name, folder)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(3)))
    nested = {place: part.net for place, part in net.nested().items()}
    save_student(folder / name, net, {})
    kept = {place: part for place, part in nested.items() if (folder / name / "student" / place).is_dir()}
    return {"": net.deployed(), **kept}


@pytest.mark.parametrize("name", students(text=True))
def test_transformers_answers_as_a_student_of_texts(name: str, folder: Path) -> None:
    nets = models(name, folder)
    ids = torch.randint(TEXT.classes, (3, TEXT.size), generator=seeded(2))
    for place, net in nets.items():
        assert isinstance(net, CausalLM)
        theirs = the_library().AutoModelForCausalLM.from_pretrained(folder / name / "student" / place).eval()
        with torch.no_grad():
            assert torch.equal(theirs(input_ids=ids).logits, net.network(input_ids=ids).logits)
    config = json.loads((folder / name / "student" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert len(nets) == {"elastic": 3, "supernet": 3}.get(name, 1)


def test_transformers_answers_as_a_student_with_adapters(folder: Path) -> None:
    plain = example("students", "causal_lm", folder)
    choice = type(plain)(model=plain.model, lora={"r": 2, "target_modules": ["q_proj", "down_proj"]})
    net = choice.build(TEXT, seeded()).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(3)))
    save_student(folder / "lora", net, {})
    library, ids = the_library().AutoModelForCausalLM, torch.arange(7)[None]
    theirs = library.from_pretrained(folder / "lora" / "student").eval()
    before = library.from_pretrained(plain.model).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, net.network(input_ids=ids).logits)
        assert not torch.allclose(theirs(input_ids=ids).logits, before(input_ids=ids).logits, atol=1e-2)
    assert not any("lora" in key for key in theirs.state_dict())
