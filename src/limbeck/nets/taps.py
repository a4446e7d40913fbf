"""Features by module path: from any ``nn.Module``, without touching its code.

A path is torch's dotted one, and a negative number counts from the end: ``blocks.-1`` is the last block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Outputs
from limbeck.errors import ShapeError, nearest


def resolve(module: nn.Module, path: str) -> str:
    """The plain path of the submodule that ``path`` names: negative numbers become positive ones.

    Raises:
        ShapeError: no such submodule; the message names the nearest one.
    """
    at = module
    done: list[str] = []
    for part in path.split("."):
        children = dict(at.named_children())
        number = int(part) if part.removeprefix("-").isdigit() else None
        if number is not None and number < 0:
            part = str(len(children) + number)
        if part not in children:
            raise ShapeError(_not_found(module, path, done, children))
        done.append(part)
        at = children[part]
    return ".".join(done)


def _not_found(module: nn.Module, path: str, done: list[str], children: Mapping[str, Any]) -> str:
    where = ".".join(done) or type(module).__name__
    close = nearest(path, [name for name, _ in module.named_modules() if name])
    hint = f"did you mean {close!r}? " if close else ""
    names = list(children)
    shown = ", ".join(names if len(names) <= 12 else [*names[:5], "...", *names[-2:]]) or "nothing"
    return f"no tap {path!r} in {type(module).__name__}: {hint}{where} holds {shown}"


@contextmanager
def capture(module: nn.Module, taps: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context, calls of ``module`` fill the mapping with the outputs of ``taps``, by given name.

    Raises:
        ShapeError: a path that is not there, or a submodule whose output is not one tensor.
    """
    features: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for tap in taps:
            hook = module.get_submodule(resolve(module, tap)).register_forward_hook(_keep(features, tap))
            hooks.callback(hook.remove)
        yield features


def _keep(features: dict[str, Tensor], tap: str) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ShapeError(
                f"tap {tap!r} gives a {type(output).__name__}, not one tensor: tap a submodule of it"
            )
        features[tap] = output

    return hook


class Tapped(Net):
    """Any network with the forward that the library asks for: ``(batch, taps, teacher) -> Outputs``.

    ``network`` is called with ``batch.inputs`` and must return logits [B, C].

    Attributes:
        description: what a reader of the weights needs to make the network again; None = not known.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.description: dict[str, Any] | None = None

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """Logits and the tapped features.

        Args:
            batch: inputs [B, ...].
            taps: module paths inside ``network``.
            teacher: not read.

        Raises:
            ShapeError: a tap that is not there, or an output that is not a tensor [B, C].
        """
        with capture(self.network, taps) as features:
            out = self.network(batch.inputs)
        if not isinstance(out, Tensor) or out.ndim != 2:
            got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ShapeError(
                f"{type(self.network).__name__} gave {got} but must give logits [batch, classes]"
            )
        return Outputs(logits=out, features=features)


@contextmanager
def classifier_inputs(net: Net, classes: int) -> Iterator[list[Tensor]]:
    """Within the context, each call of ``net`` adds the features [B, D] that its classifier read.

    The classifier is the linear layer whose output the logits are. Nothing is added where there is none such.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    found: list[Tensor] = []

    def keep(_layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((given[0], output))

    def choose(_net: nn.Module, _given: Any, outputs: Outputs) -> None:
        same = [x for x, y in calls if y.data_ptr() == outputs.logits.data_ptr() and x.ndim == 2]
        found.extend(x.detach().float().cpu() for x in same[-1:])
        calls.clear()

    with ExitStack() as hooks:
        for layer in net.modules():
            if isinstance(layer, nn.Linear) and layer.out_features == classes:
                hooks.callback(layer.register_forward_hook(keep).remove)
        hooks.callback(net.register_forward_hook(choose).remove)
        yield found


def core(student: nn.Module) -> nn.Module:
    """The plain network inside ``student`` where it holds all there is to save; else ``student`` itself."""
    network = getattr(student, "network", None)
    if isinstance(network, nn.Module) and all(name.startswith("network.") for name in student.state_dict()):
        return network
    return student


class Frozen(Net):
    """A network that never learns: no gradient, in evaluation mode whatever calls ``train()``.

    Checkpoints leave it out, since it is made again from the recipe.
    """

    constant = True

    def __init__(self, network: Net) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stays in evaluation mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """The network's outputs, without a graph."""
        out: Outputs = self.network(batch, taps, teacher)
        return out
