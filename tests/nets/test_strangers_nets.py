"""Networks of strangers: code that they bring is not run, and what they say of themselves is checked."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tests.engine import small
from tests.nets import small_transformers

from limbeck.contracts import Spec
from limbeck.data.tokenizers import characters
from limbeck.errors import ConfigError, LimbeckError
from limbeck.nets import backbones, language_models

CANARY = "from pathlib import Path\nPath({!r}).touch()\n"
ASKED = {
    "AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", None],
}  # fmt: skip


@pytest.fixture
def language_folder(tmp_path: Path) -> Path:
    place = tmp_path / "lm"
    small_transformers.llama(num_hidden_layers=1).save_pretrained(place)
    characters(["abc"]).save_pretrained(place)
    (place / "evil.py").write_text(CANARY.format(str(tmp_path / "canary")))
    return place


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("load", [language_models.load_form, language_models.load_model])
def test_a_model_that_brings_code(language_folder: Path, tmp_path: Path, load: Any) -> None:
    change(language_folder / "config.json", auto_map=ASKED, model_type="evil")
    with pytest.raises(ConfigError, match="contains custom code"):
        load(str(language_folder))
    assert not (tmp_path / "canary").exists()


def test_a_tokenizer_that_brings_code(language_folder: Path, tmp_path: Path) -> None:
    change(language_folder / "tokenizer_config.json", auto_map=ASKED, tokenizer_class="EvilTokenizer")
    with pytest.raises(ConfigError):
        language_models.load_tokenizer(str(language_folder))
    assert not (tmp_path / "canary").exists()


def test_a_pickle_in_place_of_weights(language_folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.touch, (tmp_path / "canary",)

    (language_folder / "model.safetensors").unlink()
    (language_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        language_models.load_model(str(language_folder))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"hidden_size": "x"}),
        ("config.json", {"num_attention_heads": 5}),
        ("tokenizer_config.json", {"model_max_length": "x"}),
        ("tokenizer_config.json", {"pad_token": 3}),
        ("tokenizer.json", {"model": {"type": "BPE"}}),
    ],
)
def test_descriptions_of_another_kind(language_folder: Path, file: str, fields: dict[str, Any]) -> None:
    change(language_folder / file, **fields)
    load = language_models.load_model if file == "config.json" else language_models.load_tokenizer
    with pytest.raises(ConfigError, match="cannot load") as error:
        load(str(language_folder))
    assert len(str(error.value).splitlines()) == 1


ARGS: dict[str, tuple[dict[str, Any], str]] = {
    "a pickle": ({"checkpoint_path": "x.bin"}, "has 'checkpoint_path', which is no argument of a network"),
    "weights": ({"pretrained": True}, "has 'pretrained'"),
    "a name that is none": ({"depht": 1}, "cannot be made with model_args .*depht"),
    "a word": ({"embed_dim": "x"}, "cannot be made with model_args"),
    "channels": ({"in_chans": 0}, "in_chans of vit_tiny_patch16_224 is 0"),
    "size": ({"img_size": None}, "img_size of vit_tiny_patch16_224 is None"),
}


@pytest.mark.parametrize("case", ARGS)
def test_arguments_of_a_network(tmp_path: Path, case: str) -> None:
    args, message = ARGS[case]
    name = small.backbone(tmp_path, "small")
    spec = Spec(classes=3, channels=1, size=8)
    with pytest.raises(ConfigError, match=message):
        backbones.load_network(name, 3, pretrained=False, model_args=args, spec=spec)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_args": []}, {"model_args": None}, {"pretrained_cfg": "x"}, {"architecture": 3},
        {"architecture": []}, {"pretrained_cfg": {"input_size": [1]}}, {"pretrained_cfg": {"mean": ["x"]}},
    ],
)  # fmt: skip
def test_a_timm_folder_of_another_kind(tmp_path: Path, fields: dict[str, Any]) -> None:
    name = small.backbone(tmp_path, "small")
    change(tmp_path / "small" / "config.json", **fields)
    with pytest.raises(LimbeckError):
        backbones.load_backbone(name)
