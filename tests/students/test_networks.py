"""The teachers and students that are networks: built, frozen or not, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from limbeck.contracts import Batch, Spec
from limbeck.errors import CheckpointError, ConfigError, ShapeError
from limbeck.nets.backbones import InputSpec, load_network
from limbeck.nets.kd_prompts import KDPrompts
from limbeck.nets.prompt_map import PromptMap
from limbeck.nets.prompted_vit import PromptedViT
from limbeck.nets.prompts.apt import APT
from limbeck.nets.prompts.coda import CODA
from limbeck.students.module import ModuleStudent
from limbeck.students.prompted_vit import PromptedViTStudent
from limbeck.students.timm import TimmStudent
from limbeck.teachers.module import ModuleTeacher
from limbeck.teachers.none import NoTeacher
from limbeck.teachers.prompted_vit import PromptedViTTeacher
from limbeck.teachers.timm import TimmTeacher

SPEC = Spec(classes=6, tasks=3, channels=1, size=28)
IMAGES = InputSpec(channels=1, size=28, mean=(0.0,), std=(1.0,))
LEARNER = CODA(pool=6, length=4, blocks=(0, 1))


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def flat(classes: int = 6) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, classes))


def make_batch() -> Batch:
    ids = torch.arange(4)
    return Batch(inputs=torch.rand(4, 1, 28, 28, generator=seed(1)), labels=ids, index=ids, view=ids)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    args = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 3}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": args,
        "pretrained_cfg": {"input_size": [1, 28, 28]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    network = load_network(f"local-dir:{tmp_path}", 6, pretrained=False, generator=seed())
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    return f"local-dir:{tmp_path}"


def test_prompted_pair_shares_the_students_query(folder: str) -> None:
    student = PromptedViTStudent(
        backbone=folder, blocks=2, prompts=LEARNER, kd_prompts=KDPrompts(length=4), share=0.3
    )
    teacher = PromptedViTTeacher(backbone=folder, prompts=LEARNER)
    assert student.input_spec() == teacher.input_spec() == IMAGES
    built = student.build(SPEC, seed())
    assert isinstance(built, PromptedViT) and built.share == 0.3 and len(built.backbone.blocks) == 2
    guide = teacher.build(Spec(classes=6, tasks=3, channels=1, size=28, query_dim=16), seed(1))
    assert guide.query_dim == 16 and guide.kd_head is None
    assert built(make_batch()).soft_logits is not None


def test_prompted_without_keys_or_prompts(folder: str) -> None:
    for prompts in (None, APT()):
        assert PromptedViTStudent(backbone=folder, prompts=prompts).build(SPEC, seed()).query_dim is None


def test_prompted_refuses_what_does_not_fit(folder: str) -> None:
    with pytest.raises(ConfigError, match="choose one of them"):
        PromptedViTStudent(kd_prompts=KDPrompts(), prompt_map=PromptMap())
    with pytest.raises(ConfigError, match=r"share is 1\.2"):
        PromptedViTStudent(share=1.2)
    with pytest.raises(ConfigError, match="multiple of the 4 tasks"):
        spec = Spec(classes=6, tasks=4, channels=1, size=28)
        PromptedViTStudent(backbone=folder, prompts=LEARNER).build(spec, seed())


def test_the_same_seed_builds_the_same_student(folder: str) -> None:
    one, other = (PromptedViTStudent(backbone=folder, prompts=LEARNER).build(SPEC, seed(3)) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def check_learns(net: Any) -> None:
    said = net.train()(make_batch(), taps=())
    said.logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def check_frozen(net: Any) -> None:
    before = {n: t.clone() for n, t in net.state_dict().items()}
    said = net.train()(make_batch())
    assert said.logits.shape == (4, 6) and not said.logits.requires_grad
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert not any(module.training for module in net.modules())


def test_timm_networks(folder: str) -> None:
    check_learns(
        TimmStudent(model="test_resnet", model_args={"in_chans": 1, "img_size": 28}).build(SPEC, seed())
    )
    check_learns(TimmStudent(model=folder, pretrained=True).build(SPEC, seed()))
    check_frozen(TimmTeacher(model=folder).build(SPEC, seed()))
    assert TimmTeacher(model=folder).input_spec() == IMAGES
    with pytest.raises(ShapeError, match=r"must be \[7, 24\]: give weights for this data's classes"):
        TimmTeacher(model=folder).build(Spec(classes=7, channels=1, size=28), seed())


def test_timm_taps(folder: str) -> None:
    student = TimmStudent(model=folder).build(SPEC, seed())
    assert student(make_batch(), taps=("blocks.-1",)).features["blocks.-1"].shape == (4, 17, 24)


def test_own_modules(tmp_path: Path) -> None:
    check_learns(ModuleStudent(target=flat(), images=IMAGES).build(SPEC, seed()))
    check_frozen(ModuleTeacher(target=flat(), images=IMAGES).build(SPEC, seed()))
    linear = {"in_features": 28, "out_features": 6}
    with pytest.raises(ShapeError, match=r"torch\.nn:Linear gives \[1, 1, 28, 6\] for one image"):
        ModuleStudent(target="torch.nn:Linear", kwargs=linear, images=IMAGES).build(SPEC, seed())
    with pytest.raises(ShapeError, match=r"gives \[1, 5\] for one image but must give logits \[1, 6\]"):
        ModuleTeacher(target=flat(5), images=IMAGES).build(SPEC, seed())
    file = tmp_path / "flat.safetensors"
    source = flat()
    safetensors.torch.save_file(source.state_dict(), file)
    built = ModuleTeacher(target=flat(), weights=str(file), images=IMAGES).build(SPEC, seed())
    assert torch.equal(built.state_dict()["network.network.2.weight"], source.state_dict()["2.weight"])
    with pytest.raises(CheckpointError, match="do not fit Sequential"):
        ModuleTeacher(target=flat(5), weights=str(file), images=IMAGES).build(SPEC, seed())


def test_own_modules_by_path() -> None:
    for target, message in (
        ("flat", "must be package.module:callable"),
        ("no_such_package:flat", "cannot be imported"),
        ("torch.nn:Linaer", "did you mean 'torch.nn:Linear'"),
        ("torch:ones", "does not take kwargs"),
    ):
        kwargs = {"wrong": 1}
        with pytest.raises(ConfigError, match=message):
            ModuleStudent(target=target, kwargs=kwargs, images=IMAGES).build(SPEC, seed())
    with pytest.raises(ConfigError, match="gave a Tensor, not"):
        ModuleStudent(target="torch:ones", kwargs={"size": (1,)}, images=IMAGES).build(SPEC, seed())


def test_checking_a_module_leaves_its_mode_and_buffers() -> None:
    module = flat().train()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    ModuleStudent(target=module, images=IMAGES).build(SPEC, seed())
    assert module.training and module[1].training
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())


def test_no_teacher_builds_nothing() -> None:
    with pytest.raises(ConfigError, match="teacher is none"):
        NoTeacher().build(SPEC, seed())
