"""Vision transformers by name: from timm, from a local folder or file, or shipped with the package.

Weights are read from safetensors only, so that a file from a stranger runs no code.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import PretrainedCfg, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from limbeck.contracts import Spec
from limbeck.errors import CheckpointError, ConfigError, DataError, ShapeError, unknown
from limbeck.nets import hub
from limbeck.nets.forms import check_form
from limbeck.plain import from_json

SHIPPED = Path(__file__).parent / "weights"


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What images a network expects.

    Attributes:
        channels: number of channels.
        size: height and width in pixels.
        mean: of each channel, for values in [0, 1].
        std: of each channel.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Source:
    """Where a network comes from: all that can be told without reading weights.

    Attributes:
        architecture: timm's name of the architecture.
        model_args: arguments for ``timm.create_model``.
        cfg: timm's description of the pretrained weights.
        weights: the safetensors file; None = to be downloaded by name.

    Raises:
        ConfigError: arguments that are not the network's, or a description that is none.
    """

    architecture: str
    model_args: Mapping[str, Any]
    cfg: Mapping[str, Any]
    weights: Path | None

    def __post_init__(self) -> None:
        check_form(self.cfg, self.model_args, self.architecture)


def find(name: str, weights: str | Path | None = None) -> Source:
    """The source of the network that ``name`` names.

    Args:
        name: a shipped network (``limbeck-glyphs-m``), a timm name (``vit_small_patch16_224.augreg_in21k``),
            or a folder in timm's layout, ``local-dir:PATH``.
        weights: a safetensors file that stands in for the named weights.

    Raises:
        ConfigError: unknown name; the message has the nearest one.
        CheckpointError: a folder or file that is not there or not safetensors.
    """
    folder = Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else SHIPPED / name
    if name.startswith("local-dir:") or (name and os.path.isfile(folder / "config.json")):
        source = _from_folder(folder)
    else:
        source = _from_timm(name)
    if weights is None:
        return source
    return Source(source.architecture, source.model_args, source.cfg, _checked_file(Path(weights)))


def _from_folder(folder: Path) -> Source:
    path = folder / "config.json"
    try:
        config = from_json(path.read_text(encoding="utf-8"))
        architecture, args, about = (
            config["architecture"], config.get("model_args", {}), config.get("pretrained_cfg", {})
        )  # fmt: skip
    except FileNotFoundError:
        raise CheckpointError(f"no network at {folder}: it needs config.json and model.safetensors") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no timm config: {type(error).__name__} {error}") from None
    if str(architecture) not in _timm_names():
        raise _unknown(str(architecture), str(path))
    check_form(about, args, str(path))
    return Source(
        architecture, args, {**_known(about), "architecture": architecture}, folder / "model.safetensors"
    )


def _from_timm(name: str) -> Source:
    architecture, _, tag = name.partition(".")
    if architecture not in _timm_names():
        raise _unknown(name, "")
    tags = {full.partition(".")[2] for full in _timm_pretrained() if full.partition(".")[0] == architecture}
    if tag and tag not in tags:
        raise unknown("weights", name, {f"{architecture}.{known}" for known in tags})
    cfg: Any = timm.get_pretrained_cfg(name)
    return Source(architecture, {}, {} if cfg is None else cfg.to_dict(), None)


def _unknown(name: str, where: str) -> ConfigError:
    """timm has more than a thousand names, so the message holds only the near ones."""
    close = difflib.get_close_matches(name, [*_timm_names(), *shipped()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    at = f" at {where}" if where else ""
    return ConfigError(
        f"unknown network {name!r}{at}: {hint}shipped are {', '.join(shipped()) or 'none'}; "
        "timm.list_models() has the others"
    )


def shipped() -> tuple[str, ...]:
    """The names of the networks in the package."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))


@cache
def _timm_names() -> frozenset[str]:
    return frozenset(timm.list_models())


@cache
def _timm_pretrained() -> frozenset[str]:
    return frozenset(timm.list_pretrained())


def _known(cfg: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(PretrainedCfg)}
    return {key: value for key, value in cfg.items() if key in names}


def _checked_file(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"weights {path} are not safetensors: pickled files can run code and are refused; "
            "convert them with safetensors.torch.save_file"
        )
    if not os.path.isfile(path):
        raise CheckpointError(f"no weights at {path}: give the path of a safetensors file")
    return path


def input_spec(name: str) -> InputSpec:
    """What images the named network expects, without reading weights.

    Raises:
        ConfigError: unknown name.
        CheckpointError: a folder that is not there.
    """
    return network_input(name, {})


def network_input(name: str, model_args: Mapping[str, Any]) -> InputSpec:
    """``input_spec`` where ``model_args`` stand in for the network's own arguments."""
    source = find(name)
    return _input_spec(source.cfg, {**source.model_args, **model_args})


def describe(name: str, model_args: Mapping[str, Any], network: Any) -> dict[str, Any]:
    """The ``config.json`` that makes a folder with ``network``'s weights loadable by ``local-dir:FOLDER``.

    Args:
        name: what the network was made from, as for ``find``.
        model_args: the arguments that stood in for the network's own.
        network: the timm network.
    """
    source = find(name)
    args = {**source.model_args, **model_args}
    form = _input_spec(source.cfg, args)
    args.pop("weight_init", None)  # how it started, not what it is
    args, sized = _without_size(source, args), not _any_size(source)
    return {
        "architecture": source.architecture,
        "num_classes": int(network.num_classes),
        "num_features": int(network.num_features),
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [form.channels, form.size, form.size], "fixed_input_size": sized,
            "mean": list(form.mean), "std": list(form.std), "num_classes": int(network.num_classes),
            "classifier": network.pretrained_cfg.get("classifier"),
            "first_conv": network.pretrained_cfg.get("first_conv"),
        },
    }  # fmt: skip


def _input_spec(cfg: Mapping[str, Any], model_args: Mapping[str, Any]) -> InputSpec:
    channels, size, _ = cfg.get("input_size") or (3, 224, 224)
    channels = model_args.get("in_chans", channels)
    size = model_args.get("img_size", size)
    size = size if isinstance(size, int) else size[0]
    mean, std = cfg.get("mean") or (), cfg.get("std") or ()
    if len(mean) != channels or len(std) != channels:  # weights for other channels say nothing of these
        mean, std = (0.0,) * channels, (1.0,) * channels
    return InputSpec(channels, size, tuple(map(float, mean)), tuple(map(float, std)))


def load_backbone(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    blocks: int | None = None,
    spec: Spec | None = None,
    generator: torch.Generator | None = None,
) -> VisionTransformer:
    """A vision transformer without classification head; its final norm stays.

    Args:
        name: see ``find``.
        pretrained: read the named weights; without them the start is drawn from ``generator``.
        weights: a local safetensors file in place of the named weights; implies ``pretrained``.
        blocks: keep only the first blocks.
        spec: what the data gives. Another image size resamples the position table, as timm does.
        generator: for a start without weights.

    Returns:
        timm's ``VisionTransformer`` in evaluation mode.

    Raises:
        ConfigError: unknown name, or not a ``VisionTransformer``.
        CheckpointError: weights that are damaged or do not fit.
        DataError: weights that cannot be downloaded.
        ShapeError: an image size, channel count or block count that does not fit.
    """
    source = find(name, weights)
    args = _fitted(name, source, spec)
    state = read_weights(source.weights or download(source, name)) if pretrained or weights else None
    model = _create(source, {**args, "num_classes": 0}, generator)
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"backbone {name!r} is a {type(model).__name__}, but prompts need a timm VisionTransformer "
            "(vit_*, deit*): choose one of these"
        )
    if state is not None:
        _load(model, state, name, new_head=True)
    if blocks is not None:
        if not 1 <= blocks <= len(model.blocks):
            raise ShapeError(f"blocks is {blocks} but {name} has {len(model.blocks)}: give 1 to that number")
        model.blocks = nn.Sequential(*list(model.blocks)[:blocks])
    return model.eval()


def _fitted(name: str, source: Source, spec: Spec | None) -> dict[str, Any]:
    """The model arguments for images as ``spec`` says."""
    want = _input_spec(source.cfg, source.model_args)
    args = dict(source.model_args)
    if spec is None:
        return args
    if spec.channels != want.channels:
        raise ShapeError(
            f"backbone {name} reads {want.channels} channels but the images have {spec.channels}: "
            "convert the images, or choose another backbone"
        )
    if spec.size != want.size:
        args["img_size"] = spec.size
    return args


def _create(source: Source, args: Mapping[str, Any], generator: torch.Generator | None) -> nn.Module:
    size = args.get("img_size")
    args = _without_size(source, args)
    classes = args.pop("num_classes")
    try:
        with seeded(generator):
            model: nn.Module = timm.create_model(
                source.architecture, pretrained=False, pretrained_cfg=_known(source.cfg), num_classes=classes,
                **args,
            )  # fmt: skip
    except Exception as error:  # each architecture has its own ways to refuse an argument
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{source.architecture} cannot be made with model_args {args} ({detail}): give others"
        ) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(size, int) and patch is not None and size % patch[0]:
        raise ShapeError(
            f"image size {size} is no multiple of the {patch[0]} pixel patches of {source.architecture}: "
            f"use {size - size % patch[0] or patch[0]} or {size - size % patch[0] + patch[0]}"
        )
    return model


def _any_size(source: Source) -> bool:
    """Whether the architecture reads images of any size."""
    known: Any = timm.get_pretrained_cfg(source.architecture)
    return known is not None and not known.fixed_input_size


def _without_size(source: Source, args: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` as the architecture takes them: one that reads any size has no argument for it."""
    return {key: value for key, value in args.items() if key != "img_size" or not _any_size(source)}


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Within the context, draws from torch's global CPU generator depend on ``generator`` alone."""
    with torch.random.fork_rng(devices=[]):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        yield


def load_network(
    name: str,
    classes: int,
    *,
    pretrained: bool,
    weights: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    spec: Spec | None = None,
    new_head: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Any timm network with a classifier for ``classes``.

    Args:
        name: see ``find``.
        classes: C.
        pretrained: read the named weights; without them the start is drawn from ``generator``.
        weights: a local safetensors file in place of the named weights; implies ``pretrained``.
        model_args: arguments for ``timm.create_model``; they win over the source's.
        spec: what the data gives, see ``load_backbone``.
        new_head: start the classifier anew where the weights have none for ``classes``.
        generator: for what has no weights.

    Raises:
        ConfigError: unknown name.
        CheckpointError: weights that are damaged or do not fit.
        DataError: weights that cannot be downloaded.
        ShapeError: an image size, channel count or class count that does not fit.
    """
    found = find(name, weights)
    source = Source(found.architecture, {**found.model_args, **(model_args or {})}, found.cfg, found.weights)
    args = _fitted(name, source, spec)
    state = read_weights(source.weights or download(source, name)) if pretrained or weights else None
    model = _create(source, {**args, "num_classes": classes}, generator)
    if state is not None:
        _load(model, state, name, new_head=new_head)
    return model


def _load(model: Any, state: dict[str, Tensor], name: str, *, new_head: bool) -> None:
    """Read ``state`` into ``model``: every tensor, but for a classifier that may be new."""
    if isinstance(model, VisionTransformer):
        try:
            state = checkpoint_filter_fn(state, model)
        except Exception as error:  # of tensors that are not as its author thought
            raise CheckpointError(f"the weights do not fit {name}: {error}") from error
    own = model.state_dict()
    classifier = model.pretrained_cfg.get("classifier") or "head"
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    head = {f"{part}.{kind}" for part in names for kind in ("weight", "bias")}
    unfit = {key for key in head & (own.keys() | state.keys()) if _shape(own, key) != _shape(state, key)}
    if unfit and not new_head:
        key = sorted(unfit)[-1]
        raise ShapeError(
            f"the classifier of {name} is {_shape(state, key)} in the weights but must be "
            f"{_shape(own, key)}: give weights for this data's classes"
        )
    kept = {key: value for key, value in state.items() if key not in unfit}
    fresh = {key: own[key] for key in unfit & own.keys()}
    try:
        model.load_state_dict({**kept, **fresh})
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the weights do not fit {name}: {detail}") from None


def _shape(state: Mapping[str, Tensor], key: str) -> list[int] | None:
    return list(state[key].shape) if key in state else None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: not there, not safetensors, or damaged.
    """
    path = _checked_file(Path(path))
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"weights {path} are damaged: {error}; fetch or make them anew") from None


def download(source: Source, name: str) -> Path:
    """The safetensors file of timm's weights for ``name``, from the Hugging Face hub or its local cache.

    Raises:
        DataError: no such file is known, or it cannot be fetched; the message tells the other ways.
    """
    ways = (
        "give a local file (weights=FILE.safetensors) or folder (local-dir:FOLDER), a shipped network "
        f"({', '.join(shipped()) or 'none here'}), or random weights (pretrained=false)"
    )
    repository = source.cfg.get("hf_hub_id")
    if not repository:
        raise DataError(f"timm knows no weights for {name!r}: name them with a tag (NAME.TAG), {ways}")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    file = "model.safetensors"
    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        if not hub.answers():
            raise ConnectionError
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # of several libraries and many families
        reason = type(error).__name__
        raise DataError(f"cannot download {repository}/{file} ({reason}): {ways}") from None
