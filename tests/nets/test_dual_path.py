"""The second path through a network: its blocks, where they stand, what it starts as, what reaches what."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nets.conftest import make_net, make_vit, seed
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Outputs, Progress, Spec
from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.dual_path import PromptPath, SecondPath, stages_of
from limbeck.nets.prompt_blocks import PartialConv, PromptBlock, StagePrompt
from limbeck.nets.prompts.coda import CODA
from limbeck.nets.small import MLP, CifarResNet, ConvNet
from limbeck.nets.taps import Frozen, Tapped

CLASSES = 6
IDENTITY = PromptPath(init="identity")


def batch(count: int = 4, channels: int = 3, size: int = 16) -> Batch:
    index = torch.arange(count)
    inputs = torch.randn(count, channels, size, size, generator=seed(4))
    return Batch(inputs=inputs, labels=index % CLASSES, index=index, view=0 * index)


def settled(net: nn.Module) -> nn.Module:
    """With running statistics and biases that are not those of a fresh network."""
    torch.manual_seed(3)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return net


NETS: dict[str, Any] = {
    "cnn": lambda: (ConvNet(3, (8, 12, 16), CLASSES), 3, 16),
    "cifar_resnet": lambda: (CifarResNet(8, CLASSES, (4, 8, 8)), 3, 16),
    "mlp": lambda: (MLP(64, (32, 24), CLASSES), 1, 8),
    "timm resnet": lambda: (timm.create_model("test_resnet", num_classes=CLASSES), 3, 32),
    "timm convnext": lambda: (timm.create_model("test_convnext", num_classes=CLASSES), 3, 32),
    "timm vit": lambda: (make_vit(num_classes=CLASSES), 1, 28),
}  # fmt: skip
every = pytest.mark.parametrize("name", NETS)


def made(name: str, config: PromptPath = IDENTITY) -> tuple[Net, SecondPath, Batch]:
    torch.manual_seed(0)
    network, channels, size = NETS[name]()
    net = Tapped(settled(network)).requires_grad_(False).eval()
    spec = Spec(classes=CLASSES, channels=channels, size=size)
    return net, SecondPath(net, config, spec, seed()), batch(channels=channels, size=size)


def prompt(path: SecondPath, given: Batch, said: Outputs) -> Tensor:
    return path(given, said).along("prompt").logits


@every
@pytest.mark.parametrize("plus", [False, True])
def test_identity_start_answers_as_the_teacher(name: str, plus: bool) -> None:
    net, path, images = made(name, dataclasses.replace(IDENTITY, plus=plus, after_last=name != "timm vit"))
    said = net(images)
    assert len(path.blocks) >= 1
    assert torch.equal(prompt(path.eval(), images, said), said.logits)


@every
def test_random_start_answers_otherwise_and_reaches_every_block(name: str) -> None:
    net, path, images = made(name, PromptPath())
    said = net(images)
    answer = prompt(path.train(), images, said)
    assert not torch.allclose(answer, said.logits)
    answer.square().sum().backward()
    first: Any = path.blocks[0]
    assert first.prompt.up.weight.grad.abs().sum() > 0
    assert first.fuse.conv.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in path.parameters())
    assert all(p.grad is None for p in net.parameters())


@every
def test_the_network_is_the_same_afterwards(name: str) -> None:
    net, path, images = made(name, PromptPath(plus=True))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    said = net(images)
    prompt(path.train(), images, said).sum().backward()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(net(images).logits, said.logits)


@pytest.mark.parametrize("name", ["cnn", "timm vit"])
def test_plus_trains_all_of_its_copy_but_the_classifier(name: str) -> None:
    net, path, images = made(name, PromptPath(plus=True))
    prompt(path.train(), images, net(images)).sum().backward()
    assert path.copy is not None
    learning = {n for n, p in path.copy.named_parameters() if p.requires_grad}
    assert {n for n, _ in path.copy.named_parameters()} - learning == {
        "network.head.weight", "network.head.bias",
    }  # fmt: skip
    own, copied = path.parameter_groups()
    assert (own["lr_scale"], copied["lr_scale"]) == (1.0, 0.1)
    assert len(copied["params"]) == len(learning)
    assert all(p.grad is not None for p in copied["params"])
    assert not {id(p) for p in path.parameters()} & {id(p) for p in net.parameters()}


@pytest.mark.parametrize("kind", ["train", "frozen"])
def test_batch_norm_of_the_copy(kind: Any) -> None:
    net, path, images = made("cnn", PromptPath(plus=True, plus_norm=kind))
    assert path.copy is not None
    prompt(path.train(), images, net(images))
    own, copied = (n.get_submodule("network.stages.0.1").state_dict() for n in (net, path.copy))
    assert torch.equal(own["running_mean"], copied["running_mean"]) == (kind == "frozen")
    assert not path.eval().copy.get_submodule("network.stages.0.1").training  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [5, 7, 16, 31])
def test_one_image_of_any_size(size: int) -> None:
    """Stages with stride and odd maps: the blocks keep height and width."""
    net, path, _ = made("cnn", PromptPath(after_last=True))
    one = batch(1, size=size)
    answer = prompt(path.train(), one, net(one))
    answer.sum().backward()
    assert answer.shape == (1, CLASSES)


def test_blocks_stand_between_the_stages() -> None:
    assert made("cnn")[1].edited == ("stages.0", "stages.1")
    assert made("cnn", PromptPath(after_last=True))[1].edited == ("stages.0", "stages.1", "stages.2")
    assert made("cnn", PromptPath(stages=("stages.0", "stages.-1")))[1].edited == ("stages.0",)
    assert made("cifar_resnet")[1].edited == ("layer1", "layer2")


def test_each_block_reads_the_path_itself() -> None:
    """The second stage's output on the path comes from what the first block made of the first's."""
    net, path, images = made("cnn", PromptPath())
    network: Any = net.network
    first, second = path.blocks
    h = first(network.stages[0](images.inputs))
    h = second(network.stages[1](h))
    want = path.head(network.pool(network.stages[2](h)))
    torch.testing.assert_close(prompt(path, images, net(images)), want)


def test_features_of_the_path() -> None:
    net, path, images = made("cnn", PromptPath())
    said = path(images, net(images), ("stages.0",))
    network: Any = net.network
    want = path.blocks[0](network.stages[0](images.inputs))
    torch.testing.assert_close(said.along("prompt").features["stages.0"], want)
    assert said.along("").paths.keys() == {"prompt"}


def test_a_frozen_teacher_lets_gradients_through() -> None:
    net = Frozen(Tapped(ConvNet(3, (8, 12), CLASSES)))
    path = SecondPath(net, PromptPath(), Spec(classes=CLASSES, size=16), seed())
    prompt(path, batch(), net(batch())).sum().backward()
    assert path.head.weight.grad is not None
    assert path.blocks[0].fuse.conv.weight.grad.abs().sum() > 0  # type: ignore[union-attr,operator]


def test_a_teacher_that_is_learning_is_refused() -> None:
    net, path, images = made("cnn")
    net.train()
    with pytest.raises(ConfigError, match="needs a teacher that stands still: use schedule teacher_then"):
        path(images, Outputs(torch.zeros(4, CLASSES)))


def test_classes_in_another_order() -> None:
    net, path, images = made("cnn")
    path.order = torch.tensor([3, 1, 0, 2, 5, 4])
    assert torch.equal(prompt(path, images, net(images)), net(images).logits[:, path.order])


def test_the_same_generator_makes_the_same_path() -> None:
    torch.manual_seed(1)
    one = made("cnn", PromptPath())[1].state_dict()
    other = made("cnn", PromptPath())[1].state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


# A prompted transformer, whose prompted blocks are not called as modules


def prompted(config: PromptPath = IDENTITY) -> tuple[Net, SecondPath, Batch]:
    net = make_net(CODA(pool=6, length=4, blocks=(0, 1)))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    images = batch(channels=1, size=28)
    return net.eval(), SecondPath(net, config, Spec(classes=6, channels=1, size=28), seed()), images


def test_prompted_transformer() -> None:
    net, path, images = prompted()
    assert path.edited == ("blocks.0", "blocks.1")
    assert torch.equal(prompt(path, images, net(images)), net(images).logits)
    net, path, images = prompted(PromptPath())
    prompt(path, images, net(images)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in path.blocks[0].prompt.up.parameters())  # type: ignore[union-attr]


def test_prompted_transformer_with_a_copy() -> None:
    net, path, images = prompted(PromptPath(plus=True))
    assert path.copy is not None
    prompt(path.train(), images, net(images)).sum().backward()
    learning = {n: p for n, p in path.copy.named_parameters() if p.requires_grad}
    assert learning.keys() == {f"backbone.{n}" for n, _ in net.get_submodule("backbone").named_parameters()}
    assert all(p.grad is not None for p in learning.values())
    assert not any(getattr(part, "constant", False) for part in path.modules())


def test_class_token_is_untouched() -> None:
    torch.manual_seed(0)
    block = PromptPath().block(8, (2, 3))
    tokens = torch.randn(2, 7, 8)
    got = block(tokens)
    assert torch.equal(got[:, 0], tokens[:, 0])
    maps = tokens[:, 1:].transpose(1, 2).reshape(2, 8, 2, 3)
    torch.testing.assert_close(got[:, 1:].transpose(1, 2).reshape(2, 8, 2, 3), block(maps))


# The blocks


@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([1, 3, 5]))
@settings(deadline=None, max_examples=25)
def test_partial_convolution(channels: int, ratio: int, kernel: int) -> None:
    """The first share is an ordinary convolution of itself; the rest passes; a share is at least 1."""
    conv = PartialConv(channels, ratio, kernel)
    x = torch.randn(2, channels, 5, 4, generator=seed())
    y = conv(x)
    own = max(1, channels // ratio)
    torch.testing.assert_close(y[:, :own], conv.conv(x[:, :own]))
    assert torch.equal(y[:, own:], x[:, own:])
    assert conv.conv.weight.shape == (own, own, kernel, kernel)


def test_other_channels_enter_through_the_point_wise_convolution_alone() -> None:
    torch.manual_seed(0)
    conv = PartialConv(8, 4, 3)
    x = torch.randn(1, 8, 5, 5)
    moved = x.clone()
    moved[:, 2:] += 1
    assert torch.equal(conv(moved)[:, :2], conv(x)[:, :2])
    block = PromptBlock(8, 1, 4, (3,))
    assert not torch.allclose(block(moved), block(x))


def test_batch_norm_in_the_blocks() -> None:
    block = PromptBlock(8, 2, 2, (3, 5), norm="batch")
    kinds = [type(part).__name__ for part in block]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", *2 * ["PartialConv", "Conv2d", "BatchNorm2d", "ReLU"],
                     "Conv2d"]  # fmt: skip


def test_kaiming_start() -> None:
    torch.manual_seed(0)
    block = StagePrompt(PromptBlock(256, 1, 1, (3,)), 256, None)
    block.start("random")
    conv = block.prompt[2].conv.weight  # type: ignore[union-attr]
    assert float(conv.std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert not block.fuse.conv.bias.any()  # type: ignore[union-attr]


# The path's loss


def answers(count: int = 4) -> tuple[Tensor, Tensor, Tensor, Batch]:
    z = torch.randn(3, count, CLASSES, generator=seed(), dtype=torch.float64)
    return z[0], z[1].requires_grad_(), z[2], batch(count)


def terms(path: SecondPath, z_t: Tensor, z_p: Tensor, z_s: Tensor, images: Batch) -> dict[str, Tensor]:
    said = Outputs(z_t, paths={"prompt": Outputs(z_p)})
    return path.terms(said, Outputs(z_s), images, Progress())


def test_equal_answers_leave_the_labels_alone() -> None:
    _, path, _ = made("cnn")
    _, z, _, images = answers()
    found = terms(path, z.detach(), z, z.detach(), images)
    (grad,) = torch.autograd.grad(found["kd"] + found["student"], z)
    assert float(found["kd"]) == float(found["student"]) == 0
    assert float(grad.abs().max()) < 1e-15
    assert float(found["labels"]) > 0


@given(st.integers(0, 1000), st.floats(-50, 50))
@settings(deadline=None, max_examples=20)
def test_distillation_terms_do_not_see_a_shift_and_are_not_negative(number: int, shift: float) -> None:
    _, path, _ = made("cnn")
    z = torch.randn(3, 4, CLASSES, generator=seed(number), dtype=torch.float64)
    rows = shift * torch.arange(4.0, dtype=torch.float64)[:, None]
    plain, moved = (terms(path, *each, batch()) for each in (z, (z[0] + rows, z[1], z[2] - rows)))
    for name in ("kd", "student"):
        torch.testing.assert_close(moved[name], plain[name])
        assert float(plain[name]) >= -1e-12


def test_weights_of_the_terms() -> None:
    z_t, z_p, z_s, images = answers()
    one = terms(made("cnn", PromptPath(temperature=2))[1], z_t, z_p, z_s, images)
    config = PromptPath(w_ce=0.5, w_teacher=0, w_student=3, temperature=2)
    other = terms(made("cnn", config)[1], z_t, z_p, z_s, images)
    ratios = {name: float(other[name] / one[name]) for name in one}
    assert ratios == pytest.approx({"labels": 0.5, "kd": 0, "student": 3})


def test_labels_that_may_not_be_read() -> None:
    z_t, z_p, z_s, images = answers()
    known = dataclasses.replace(images, labelled=torch.tensor([True, False, True, False]))
    path = made("cnn")[1]
    want = nn.functional.cross_entropy(z_p[::2], images.labels[::2])
    assert float(terms(path, z_t, z_p, z_s, known)["labels"]) == pytest.approx(float(want))


# What is refused


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kernels", (3, 4), r"kernels is \[3, 4\]: allowed are odd sizes, which keep H and W"),
        ("r1", 0, "r1 is 0: allowed are values of at least 1"),
        ("w_student", -1.0, "w_student is -1.0: allowed are finite values of at least 0"),
        ("temperature", 0.0, "temperature is 0.0: allowed are finite values above 0"),
        ("plus_lr", float("inf"), "plus_lr is inf: allowed are finite values above 0"),
        ("stages", (), "stages is empty: name the stages' module paths, or leave it out"),
    ],
)
def test_fields_out_of_range(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptPath(**{field: value})


def test_stages_that_cannot_be_found() -> None:
    with pytest.raises(ShapeError, match=r"Sequential has no stages under a usual name .*it holds 0, 1"):
        stages_of(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    with pytest.raises(ShapeError, match=r"no tap 'stages.7' in ConvNet"):
        made("cnn", PromptPath(stages=("stages.7", "stages.1")))


def test_a_classifier_of_other_classes() -> None:
    with pytest.raises(ShapeError, match=r"linear layer to 6 classes but 'pool.0' is not: set head to its"):
        made("cnn", PromptPath(head="pool.0"))


def test_tokens_without_a_grid() -> None:
    with pytest.raises(
        ShapeError, match=r"'blocks.0' gives \[1, 17, 24\], with patches \(5, 5\): prompt blo"
    ):
        made("timm vit", PromptPath(grid=(5, 5)))
