"""Hostile networks: safetensors, configurations, tokenizers and GGUF files that lie or bring code."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from tests.faults.hostile import EVIL_CODE, Case, changed_tree, mutated, odd_value, pickled
from tests.faults.hostile_recipes import tiny
from tests.nets import small_transformers
from tests.nets.test_gguf_lm import small, write

from limbeck.contracts import Spec
from limbeck.nets import backbones, language_models

AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", None],
}


# Safetensors


def safetensors_file(random: Random, whole: bytes) -> bytes:
    """A file of tensors whose header, lengths or bytes are not what they should be."""
    size = struct.unpack("<Q", whole[:8])[0]
    header: Any = json.loads(whole[8 : 8 + size])
    match random.randrange(6):
        case 0:
            return mutated(random, whole)
        case 1:
            header = changed_tree(random, header)
        case 2:
            name = random.choice([key for key in header if key != "__metadata__"])
            header[name][random.choice(("dtype", "shape", "data_offsets"))] = random.choice(
                (
                    "F32",
                    "I64",
                    "F8_E4M3",
                    "X",
                    [0],
                    [2**62, 2],
                    [-1],
                    [1] * 999,
                    [0, 2**63],
                    [4, 0],
                    [2**64 - 1, 1],
                    None,
                )
            )
        case 3:
            return (
                struct.pack("<Q", random.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1)))
                + whole[8:]
            )
        case 4:
            raw = random.choice(
                (b"[" * 99999, b"{}", b"", b"null", b'{"a":' * 9999, b"\xff" * 9, b"{" + b" " * 10**6)
            )
            return struct.pack("<Q", len(raw)) + raw + whole[8 + size :]
        case _:
            return random.choice(
                (pickled(), b"", random.randbytes(50), whole[: random.randrange(len(whole))])
            )
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + whole[8 + size :]


ABOUT: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "num_heads": 2,
        "embed_dim": 12,
        "depth": 1,
    },
    "pretrained_cfg": {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "num_classes": 0},
}


def timm_folder(place: Path) -> bytes:
    """A folder in timm's layout; its weights."""
    place.mkdir(exist_ok=True)
    torch.manual_seed(0)
    network = backbones.VisionTransformer(**ABOUT["model_args"], num_classes=0)
    save_file(network.state_dict(), place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(ABOUT))
    return (place / "model.safetensors").read_bytes()


def safetensors_files(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """Weights read for a network, and by themselves."""
    place = folder / "net"
    whole = timm_folder(place)
    file = place / "model.safetensors"
    for number in range(count):
        raw = safetensors_file(random, whole)
        file.write_bytes(raw)
        if number % 2:
            yield Case(f"safetensors {raw[:300]!r}", lambda: backbones.read_weights(file))
        else:
            yield Case(f"network {raw[:300]!r}", lambda: backbones.load_backbone(f"local-dir:{place}"))


def timm_configs(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """``config.json`` of a network in timm's layout."""
    place = folder / "net"
    timm_folder(place)
    (place / "evil.bin").write_bytes(pickled())
    spec = Spec(classes=3, channels=1, size=8)
    spares = ["resnet18", "vit_base_patch16_224", str(place / "evil.bin"), "../x", "hf-hub:a/b"]
    keys = (
        "checkpoint_path",
        "pretrained",
        "pretrained_cfg",
        "cache_dir",
        "num_classes",
        "scriptable",
        "norm_layer",
        "act_layer",
        "file",
        "url",
        "pretrained_cfg_overlay",
        "features_only",
        "global_pool",
    )
    for number in range(count):
        about = changed_tree(random, ABOUT, spares)
        if isinstance(about, dict) and isinstance(about.get("model_args"), dict) and random.random() < 0.3:
            value = random.choice((*spares, odd_value(random)))
            about = {**about, "model_args": {**about["model_args"], random.choice(keys): value}}
        if not tiny(about):
            continue
        text = json.dumps(about)
        raw = (
            mutated(random, text.encode("utf-8", "surrogatepass"))
            if random.random() < 0.15
            else text.encode()
        )
        (place / "config.json").write_bytes(raw)
        name = f"local-dir:{place}"
        if number % 2:
            yield Case(f"timm config {text}", lambda name=name: backbones.load_backbone(name))
        else:
            yield Case(
                f"timm config {text}",
                lambda name=name: (
                    backbones.input_spec(name),
                    backbones.load_network(name, 3, pretrained=True, spec=spec, new_head=True),
                ),
            )


# Transformers


def language_folder(place: Path) -> None:
    """A tiny language model with its tokenizer, and code beside it that must not run."""
    from limbeck.data.tokenizers import characters

    small_transformers.llama(num_hidden_layers=1).save_pretrained(place)
    characters(["abcdefghij klmnop"]).save_pretrained(place)
    (place / "evil.py").write_text(EVIL_CODE)


def json_file(random: Random, path: Path, *, code: float = 0.25) -> str:
    """Change a JSON file; with the chance ``code`` it asks for code to be run. What stands in it now."""
    text = path.read_text(encoding="utf-8")
    tree = json.loads(text)
    pick = random.random()
    if pick < code:
        tree = {**tree, "auto_map": AUTO_MAP, random.choice(("model_type", "tokenizer_class", "x")): "evil"}
    elif pick < 0.85:
        tree = changed_tree(
            random, tree, ["evil", "LlamaTokenizer", "llama", "bert", "t5", "gpt2", "../evil"]
        )
    text = json.dumps(tree)
    raw = text.encode("utf-8", "surrogatepass")
    path.write_bytes(raw if pick < 0.85 else mutated(random, raw))
    return text[:1500]


def transformers_configs(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """``config.json`` and weights of a language model."""
    whole = folder / "whole"
    language_folder(whole)
    for number in range(count):
        place = folder / "lm"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        if number % 4 == 0:
            raw = safetensors_file(random, (whole / "model.safetensors").read_bytes())
            (place / "model.safetensors").write_bytes(raw)
            said = f"{raw[:200]!r}"
        elif number % 9 == 1:
            (place / "model.safetensors").unlink()
            (place / "pytorch_model.bin").write_bytes(pickled())
            said = "a pickle"
        else:
            said = json_file(
                random, place / random.choice(("config.json", "config.json", "generation_config.json"))
            )
            if not tiny(json_or_none(place / "config.json")):
                continue
        load = language_models.load_form if number % 3 == 2 else language_models.load_model
        yield Case(f"language model {said}", lambda load=load, place=place: load(str(place)))


def json_or_none(path: Path) -> Any:
    """What a JSON file holds; None where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def tokenizer_files(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """The files of a tokenizer, which then reads a text."""
    whole = folder / "whole"
    language_folder(whole)
    for _ in range(count):
        place = folder / "lm"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        name = random.choice([path.name for path in whole.glob("*.json") if "token" in path.name])
        said = json_file(random, place / name)
        if random.random() < 0.1:
            (place / "tokenizer.json").unlink()
            other = random.choice(
                ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
            )
            (place / other).write_bytes(random.choice((pickled(), b"{}", random.randbytes(99))))
        yield Case(f"tokenizer {name} {said}", lambda place=place: tokenized(str(place)))


def tokenized(model: str) -> None:
    """Load a tokenizer and read a text with it."""
    from limbeck.data.texts import Corpus, Document, Reading
    from limbeck.data.tokens import rows_of

    corpus = Corpus("x", (Document("abc def ghi"),), ("x",), "none", "none")
    rows_of(corpus, language_models.load_tokenizer(model), Reading(length=4))


def gguf_files(random: Random, folder: Path, count: int) -> Iterator[Case]:
    """GGUF files with other counts, types, lengths and bytes."""
    whole = write(small(), folder / "whole.gguf", "smollm").read_bytes()
    file = folder / "given.gguf"
    for number in range(count):
        changed = bytearray(whole)
        for _ in range(random.choice((1, 1, 2, 4))):
            at = random.choice((4, 8, 16, random.randrange(24, 1500), random.randrange(len(whole) - 8)))
            lie = random.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, random.getrandbits(64)))
            changed[at : at + 8] = struct.pack("<Q", lie)
        raw = bytes(changed) if random.random() < 0.6 else mutated(random, whole)
        raw = random.choice((pickled(), b"", b"GGUF")) if random.random() < 0.05 else raw
        file.write_bytes(raw)
        load = (language_models.load_tokenizer, language_models.load_model, language_models.load_form)[
            number % 3
        ]
        yield Case(f"gguf {number}", lambda load=load: load(str(file)))


KINDS = {
    "safetensors files": (14, safetensors_files),
    "timm configurations": (7, timm_configs),
    "transformers configurations": (3, transformers_configs),
    "tokenizer files": (4, tokenizer_files),
    "GGUF files": (2, gguf_files),
}
