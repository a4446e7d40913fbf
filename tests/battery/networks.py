"""What the batteries of teachers and students build: every choice of a wing at a tiny size."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.engine.small import backbone
from tests.served_endpoint import NAME, Server
from torch import nn

from limbeck import registry
from limbeck.contracts import Batch, Net, Spec, Student
from limbeck.data.tokens import Rows, batch_of
from limbeck.nets.backbones import InputSpec, VisionTransformer
from limbeck.nets.search_space import SearchSpace
from limbeck.students.llama import LlamaStudent
from limbeck.students.mlp import MLPStudent
from limbeck.teachers.served import Served, ServedLM

SPEC = Spec(classes=6, tasks=2, channels=1, size=8)
TEXT = Spec(classes=11, channels=0, size=7, special={"eos": 0, "pad": 0})
LLAMA = LlamaStudent(layers=2, width=12, heads=2)
SPACE = SearchSpace((1, 2), (8, 12), (2.0, 8 / 3), (1, 2))
IMAGES = InputSpec(channels=1, size=8, mean=(0.5,), std=(0.5,))


def tiny() -> nn.Module:
    """A network of the user's own, with weights, buffers and noise in training."""
    body = [nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, SPEC.classes)]
    return nn.Sequential(*body)


def classifier(folder: Path) -> str:
    """A timm network with a trained head, in a local folder."""
    place = folder / "classifier"
    if not place.exists():
        args = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 2}
        torch.manual_seed(5)
        place.mkdir()
        save_file(VisionTransformer(**args, num_classes=6).state_dict(), place / "model.safetensors")
        cfg = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "num_classes": 6, "classifier": "head"}
        about = {
            "architecture": "vit_tiny_patch16_224",
            "model_args": args,
            "num_classes": 6,
            "pretrained_cfg": cfg,
        }
        (place / "config.json").write_text(json.dumps(about))
    return f"local-dir:{place}"


def weights(folder: Path) -> str:
    """The whole state of a small perceptron."""
    place = folder / "perceptron.safetensors"
    if not place.exists():
        net = MLPStudent(hidden=(8,), images=IMAGES).build(SPEC, seeded(5))
        place.parent.mkdir(exist_ok=True, parents=True)
        save_file(net.get_submodule("network").state_dict(), place)
    return str(place)


def language_model(folder: Path) -> str:
    """A causal language model of transformers, in a local folder."""
    place = folder / "language_model"
    if not place.exists():
        LLAMA.build(TEXT, seeded(5)).save(place)
    return str(place)


@functools.cache
def served(model: str) -> str:
    """The address of a server of a language model, there until the tests end."""
    server = Server(model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.url


def reads_text(cls: type) -> bool:
    """Whether a choice's networks read text."""
    return "TextInput" in str(inspect.signature(cls.input_spec).return_annotation)  # type: ignore[attr-defined]


def example(kind: str, name: str, folder: Path) -> Any:
    """The choice with its defaults, and tiny parts for the fields that name some.

    A choice that needs a field of another name fails here: add a part for it.
    """
    cls = registry.get(kind, name)
    if cls is LlamaStudent:
        return LLAMA
    if cls is Served:
        model = language_model(folder)
        return Served(url=served(model), model=NAME, tokenizer_name=model, k=TEXT.classes)
    if reads_text(cls):
        text = {"model": language_model(folder), "spaces": (SPACE,)}
        return cls(**{f.name: text[f.name] for f in dataclasses.fields(cls) if f.name in text})
    trained = registry.get("teachers", "trained")
    parts = {
        "backbone": backbone(folder, "small"),
        "prompts": registry.get("prompts", "coda")(pool=4, length=4, blocks=(0,)),
        "model": classifier(folder),
        "network": MLPStudent(hidden=(8,), images=IMAGES),
        "tap": "hidden.-1",
        "teacher_tap": "hidden.-1",
        "teacher": trained(network=MLPStudent(hidden=(16,), images=IMAGES)),
        "members": tuple(trained(network=MLPStudent(hidden=(width,), images=IMAGES)) for width in (8, 16)),
        "weights": weights(folder),
        "target": "tests.battery.networks:tiny",
        "images": IMAGES,
    }
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    named = {f.name for f in dataclasses.fields(cls)} & set(parts)
    return cls(**{name: parts[name] for name in named if name != "weights" or name in required})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(choice: Any, seed: int = 0) -> Net:
    text = reads_text(type(choice))
    spec, teacher = (TEXT, LLAMA) if text else (SPEC, MLPStudent(hidden=(12,), images=IMAGES))
    net: Net = choice.build(spec, seeded(seed))
    if isinstance(choice, Student):
        net.attach_teacher(teacher.build(spec, seeded(9)))
    return net


def batch(net: Net | None = None, count: int = 5) -> Batch:
    """Some samples, as ``net`` reads them: images unless it is a language model."""
    index = torch.arange(count)
    if net is not None and is_language_model(net):
        ids = torch.randint(TEXT.classes, (count, TEXT.size), generator=seeded(7))
        counts = torch.rand(ids.shape, generator=seeded(8)) < 0.6
        said = torch.where(counts, ids.roll(-1, 1), -100)
        segments = (torch.arange(TEXT.size) > 3).long().expand_as(ids)
        return batch_of(Rows("made up", ids, said, segments, index, ("all",)), index)
    inputs = torch.randn(count, SPEC.channels, SPEC.size, SPEC.size, generator=seeded(7))
    return Batch(inputs=inputs, labels=index % SPEC.classes, index=index, view=0 * index)


def is_language_model(net: Net) -> bool:
    return isinstance(net, ServedLM) or has_layers(net)


def has_layers(net: Net) -> bool:
    """Whether it is a language model that is here, not one that is asked elsewhere."""
    return any(hasattr(part, "unembedding") for part in net.modules())


def classes(net: Net) -> int:
    """How many logits it gives."""
    return (TEXT if is_language_model(net) else SPEC).classes


def ordered(given: Batch, order: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """The same samples in another order, or some of them; and the places of their answers among all."""
    if given.rows is None:
        one = dataclasses.replace(
            given, inputs=given.inputs[order], labels=given.labels[order], index=order, view=given.view[order]
        )
        return one, order
    assert given.segments is not None
    said = torch.full((given.inputs.numel(),), -100).index_copy(0, given.rows, given.labels)
    rows = Rows("", given.inputs, said.view_as(given.inputs), given.segments, given.index, ("all",))
    answers = torch.full_like(said, -1).index_copy(0, given.rows, torch.arange(len(given.rows)))
    places = answers.view_as(given.inputs)[order].flatten()
    return batch_of(rows, order), places[places >= 0]
