"""Networks of the user's own: by import path, or given as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

from limbeck.contracts import Spec
from limbeck.errors import CheckpointError, ConfigError, ShapeError, unknown
from limbeck.nets.backbones import InputSpec, read_weights, seeded
from limbeck.nets.taps import Tapped

TRUST = "LIMBECK_TRUST"
"""The environment's packages, parted by commas, whose code a recipe may run."""


@dataclass(frozen=True, kw_only=True)
class GivenModule:
    """A network by import path or as it is; the fields are described where it is chosen."""

    target: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    images: InputSpec

    def input_spec(self) -> InputSpec:
        """What images the network expects; raises ``ConfigError`` where its code is not trusted."""
        check_trust(self.target)
        return self.images

    def tapped(self, spec: Spec, generator: torch.Generator) -> Tapped:
        """The network; errors as ``make_module``."""
        return Tapped(make_module(self.target, self.kwargs, self.weights, spec, generator))


def make_module(
    target: str | nn.Module,
    kwargs: Mapping[str, Any],
    weights: str | None,
    spec: Spec,
    generator: torch.Generator,
) -> nn.Module:
    """The network that ``target`` names or is, checked to give logits for ``spec``'s classes.

    Args:
        target: ``package.module:callable`` that returns an ``nn.Module``, or an ``nn.Module``.
        kwargs: arguments for the callable.
        weights: a safetensors file of its whole state, or None.
        spec: images and classes.
        generator: for its start.

    Raises:
        ConfigError: the path leads to nothing that makes a network, or to code that is not trusted.
        CheckpointError: weights that are damaged or do not fit.
        ShapeError: its output is not [batch, classes].
    """
    network = target if isinstance(target, nn.Module) else _called(target, kwargs, generator)
    if weights is not None:
        load_weights(network, weights, _name(target))
    _check_output(network, _name(target), spec)
    return network


def load_weights(network: nn.Module, weights: str, name: str) -> None:
    """Load the whole state of ``network`` from a safetensors file; ``name`` says in errors what it is.

    Raises:
        CheckpointError: not there, damaged, or of another network.
    """
    given, own = read_weights(weights), network.state_dict()
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    try:
        network.load_state_dict({**counters, **given})
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"weights {weights} do not fit {name}: {detail}") from None


def check_trust(target: Any) -> None:
    """Raise unless ``target`` is no path of code, or of a package that the environment trusts.

    Raises:
        ConfigError: ``LIMBECK_TRUST`` does not name the package.
    """
    if not isinstance(target, str):
        return
    package = target.partition(":")[0].partition(".")[0]
    if package not in os.environ.get(TRUST, "").split(","):
        raise ConfigError(
            f"target is {target!r}, code of the package {package!r} that this recipe would run: if you trust "
            f"it, set {TRUST}={package}"
        )


def _called(target: str, kwargs: Mapping[str, Any], generator: torch.Generator) -> nn.Module:
    path, colon, attribute = target.partition(":")
    if not colon or not path or not attribute:
        raise ConfigError(f"target is {target!r} but must be package.module:callable")
    check_trust(target)
    try:
        module = import_module(path)
    except ImportError as error:
        raise ConfigError(f"target {target!r} cannot be imported: {error}") from None
    if not hasattr(module, attribute):
        raise unknown(
            "target", target, [f"{path}:{name}" for name in dir(module) if not name.startswith("_")]
        )
    with seeded(generator):
        try:
            network = getattr(module, attribute)(**kwargs)
        except TypeError as error:
            raise ConfigError(f"target {target!r} does not take kwargs {dict(kwargs)}: {error}") from None
    if not isinstance(network, nn.Module):
        raise ConfigError(f"target {target!r} gave a {type(network).__name__}, not a torch.nn.Module")
    return network


def _name(target: str | nn.Module) -> str:
    return target if isinstance(target, str) else type(target).__name__


@torch.no_grad()
def _check_output(network: nn.Module, name: str, spec: Spec) -> None:
    """One image through the network in evaluation mode; its own mode is put back."""
    modes = {module: module.training for module in network.modules()}
    like = next(network.parameters(), torch.zeros(()))
    image = torch.zeros(1, spec.channels, spec.size, spec.size, device=like.device, dtype=like.dtype)
    try:
        out = network.eval()(image)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise ShapeError(f"{name} cannot read images {list(image.shape)}: {detail}") from None
    finally:
        for module, mode in modes.items():
            module.training = mode
    got = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
    if got != [1, spec.classes]:
        raise ShapeError(f"{name} gives {got} for one image but must give logits [1, {spec.classes}]")
