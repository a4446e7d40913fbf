"""Where backbones come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from limbeck.contracts import Spec
from limbeck.errors import CheckpointError, ConfigError, DataError, ShapeError
from limbeck.nets import backbones
from limbeck.nets.backbones import InputSpec, input_spec, load_backbone, load_network, timm
from limbeck.nets.torchvision_ops import declare_missing_ops

ARGS = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": ARGS,
        "pretrained_cfg": {"input_size": [1, 28, 28], "mean": [0.1], "std": [0.9]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    network = load_network(f"local-dir:{tmp_path}", 10, pretrained=False, generator=seed())
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_a_folder_in_timms_layout(folder: Path) -> None:
    name = f"local-dir:{folder}"
    assert input_spec(name) == InputSpec(1, 28, (0.1,), (0.9,))
    backbone = load_backbone(name)
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.equal(backbone.state_dict()["blocks.2.attn.qkv.weight"], saved["blocks.2.attn.qkv.weight"])
    assert torch.equal(backbone.state_dict()["norm.weight"], saved["norm.weight"])
    image = torch.rand(2, 1, 28, 28)
    assert backbone(image).shape == (2, 24) and not backbone.training
    theirs = timm.create_model(name, pretrained=True, num_classes=10).eval()
    feature = theirs.forward_head(theirs.forward_features(image), pre_logits=True)
    assert torch.equal(backbone(image), feature)


def test_the_first_blocks(folder: Path) -> None:
    whole, part = load_backbone(f"local-dir:{folder}"), load_backbone(f"local-dir:{folder}", blocks=2)
    assert len(part.blocks) == 2
    image = torch.rand(2, 1, 28, 28)
    x = whole._pos_embed(whole.patch_embed(image))
    x = whole.norm(whole.blocks[1](whole.blocks[0](x)))
    assert torch.equal(part(image), x[:, 0])
    with pytest.raises(ShapeError, match=r"blocks is 4 but .* has 3"):
        load_backbone(f"local-dir:{folder}", blocks=4)


def test_other_image_sizes(folder: Path) -> None:
    name = f"local-dir:{folder}"
    grown = load_backbone(name, spec=Spec(classes=2, channels=1, size=35))
    assert grown(torch.rand(1, 1, 35, 35)).shape == (1, 24)
    with pytest.raises(ShapeError, match=r"no multiple of the 7 pixel patches .* use 28 or 35"):
        load_backbone(name, spec=Spec(classes=2, channels=1, size=30))
    with pytest.raises(ShapeError, match="reads 1 channels but the images have 3"):
        load_backbone(name, spec=Spec(classes=2, channels=3, size=28))


def test_weights_from_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    state = {k: v + 1 for k, v in safetensors.torch.load_file(folder / "model.safetensors").items()}
    safetensors.torch.save_file(state, file)
    backbone = load_backbone(f"local-dir:{folder}", weights=str(file))
    assert torch.equal(backbone.state_dict()["norm.bias"], state["norm.bias"])
    del state["norm.bias"]
    safetensors.torch.save_file(state, file)
    with pytest.raises(CheckpointError, match=r"do not fit .*norm\.bias"):
        load_backbone(f"local-dir:{folder}", weights=str(file))


def test_what_could_run_code_or_is_damaged_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"")
    (tmp_path / "x.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match="not safetensors: pickled files can run code"):
        load_backbone("vit_tiny_patch16_224", weights=str(tmp_path / "x.pth"))
    with pytest.raises(CheckpointError, match="are damaged"):
        load_backbone(f"local-dir:{folder}", weights=str(tmp_path / "x.safetensors"))
    with pytest.raises(CheckpointError, match="no weights at"):
        load_backbone(f"local-dir:{folder}", weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(CheckpointError, match=r"it needs config\.json and model\.safetensors"):
        load_backbone(f"local-dir:{tmp_path / 'nothing'}")
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is no timm config"):
        load_backbone(f"local-dir:{folder}")


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vit_small_patch16_224'") as caught:
        load_backbone("vit_smal_patch16_224")
    assert len(str(caught.value)) < 400
    with pytest.raises(ConfigError, match=r"did you mean 'vit_small_patch16_224\.augreg_in21k'"):
        load_backbone("vit_small_patch16_224.augreg_in21")
    with pytest.raises(ConfigError, match="is a ResNet, but prompts need"):
        load_backbone("resnet18", pretrained=False)


def test_no_way_to_the_hub_is_one_line_with_the_other_ways(monkeypatch: Any) -> None:
    def unreachable() -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.get_session", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(
        DataError, match=r"cannot download timm/vit_tiny.*weights=FILE.*pretrained=false"
    ) as error:
        load_backbone("vit_tiny_patch16_224")
    assert "\n" not in str(error.value)


def test_hub_weights_are_read_from_the_cache(folder: Path, monkeypatch: Any) -> None:
    network = load_network("test_vit", 1000, pretrained=False, generator=seed())
    file = folder / "hub.safetensors"
    safetensors.torch.save_file(network.state_dict(), file)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(file))
    backbone = load_backbone("test_vit")
    assert torch.equal(backbone.state_dict()["norm.weight"], network.state_dict()["norm.weight"])


def test_random_starts_depend_on_the_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = load_backbone("test_vit", pretrained=False, generator=seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    other = load_backbone("test_vit", pretrained=False, generator=seed(3))
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_input_spec_reads_no_weights(monkeypatch: Any) -> None:
    monkeypatch.setattr(backbones, "read_weights", lambda _: pytest.fail("weights were read"))
    assert input_spec("vit_small_patch16_224").size == 224
    for name in backbones.shipped():
        assert input_spec(name).channels == 1


@pytest.mark.parametrize("name", backbones.shipped())
def test_shipped_networks_load(name: str) -> None:
    spec, backbone = input_spec(name), load_backbone(name)
    assert backbone(torch.rand(2, spec.channels, spec.size, spec.size)).shape == (2, backbone.embed_dim)


def test_any_network_of_timm_with_a_classifier(folder: Path) -> None:
    name = f"local-dir:{folder}"
    kept = load_network(name, 10, pretrained=True)
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.equal(kept.state_dict()["head.weight"], saved["head.weight"])
    with pytest.raises(
        ShapeError, match=r"classifier of .* is \[10, 24\] in the weights but must be \[7, 24\]"
    ):
        load_network(name, 7, pretrained=True)
    fresh = load_network(name, 7, pretrained=True, new_head=True)
    assert fresh.state_dict()["head.weight"].shape == (7, 24)
    assert torch.equal(fresh.state_dict()["norm.weight"], saved["norm.weight"])
    spec = Spec(classes=7, channels=1, size=32)
    convolution = load_network(
        "test_resnet", 7, pretrained=False, model_args={"img_size": 32, "in_chans": 1}, spec=spec
    )
    assert convolution(torch.rand(2, 1, 32, 32)).shape == (2, 7)


def test_torchvision_is_left_alone_where_it_loads() -> None:
    assert declare_missing_ops() is False
    assert torch.ops.torchvision.nms is not None
