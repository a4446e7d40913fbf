"""A second forward path through a frozen network: prompt blocks between its stages, and a head of its own."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck import losses
from limbeck.contracts import Adapting, Batch, Net, Outputs, Progress, Spec
from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.backbones import seeded
from limbeck.nets.edited import Edit, edited
from limbeck.nets.prompt_blocks import Grid, PromptBlock, StagePrompt
from limbeck.nets.prompted_vit import PromptedViT
from limbeck.nets.taps import Frozen, capture, resolve
from limbeck.nets.wrapped import Wrapped

PATH = "prompt"
"""The name of the second path among ``Outputs.paths``."""


@dataclass(frozen=True, kw_only=True)
class PromptPath:
    """What the second path is made of and learns from; the fields are described where it is chosen."""

    stages: tuple[str, ...] | None = None
    after_last: bool = False
    head: str | None = None
    grid: Grid | None = None
    r1: int = 4
    r2: int = 4
    kernels: tuple[int, ...] = (3, 5, 7)
    norm: Literal["none", "batch"] = "none"
    activation: Literal["relu", "none"] = "relu"
    init: Literal["random", "identity"] = "random"
    w_ce: float = 1.0
    w_teacher: float = 1.0
    w_student: float = 1.0
    temperature: float = 4.0
    lr: float = 1.0
    plus: bool = False
    plus_lr: float = 0.1
    plus_norm: Literal["train", "frozen"] = "train"
    per_task: Literal["continue", "restart"] = "continue"

    def __post_init__(self) -> None:
        for name in ("r1", "r2"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least 1")
        if any(kernel < 1 or kernel % 2 == 0 for kernel in self.kernels):
            raise ConfigError(f"kernels is {list(self.kernels)}: allowed are odd sizes, which keep H and W")
        for name in ("w_ce", "w_teacher", "w_student"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are finite values of at least 0")
        for name in ("temperature", "lr", "plus_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are finite values above 0")
        if self.stages is not None and not self.stages:
            raise ConfigError("stages is empty: name the stages' module paths, or leave it out")

    def block(self, channels: int, grid: Grid | None) -> StagePrompt:
        """P and F for a stage of ``channels``, drawn from torch's global generator."""
        prompt = PromptBlock(
            channels, self.r1, self.r2, self.kernels, norm=self.norm, activation=self.activation
        )
        block = StagePrompt(prompt, channels, grid)
        block.start(self.init)
        return block


class SecondPath(Adapting):
    """The prompt path through a teacher: its own stages are the teacher's, which stay as they are.

    A stage's output h becomes F(h + P(h)) before the next stage reads it, and a head of the path's own
    stands in the classifier's place. Gradients pass through the teacher's stages to the blocks before them.
    With ``plus`` the path runs through a copy of the teacher's network that learns too.

    Args:
        net: the teacher, as ``Network.build`` gives it; not registered.
        config: the path's fields.
        spec: what the teacher was built for.
        generator: for the blocks and the head.

    Raises:
        ShapeError: no stage, no classifier, or a stage whose output is no map, vector or tokens of patches.

    Source: Li et al., DFPT-KD (arXiv 2506.18244); what is inferred is listed in docs/systems/dfpt-kd.md.
    """

    def __init__(self, net: Net, config: PromptPath, spec: Spec, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.task = config, 0
        self._net = (net.network if isinstance(net, Frozen) else net,)
        network = network_in(self.net)
        stages = tuple(resolve(network, path) for path in config.stages or stages_of(network))
        self.edited = stages if config.after_last else stages[:-1]
        self.head_path = classifier_of(network, config.head, spec.classes)
        shapes = shapes_of(self.net, self.edited, spec)
        self.places = [
            (shape[2 if len(shape) == 3 else 1], self._grid(path, shape))
            for path, shape in zip(self.edited, shapes, strict=True)
        ]
        self.blocks, self.head = self._fresh(generator)
        self.copy: Net | None = None
        self.follow(anew=True)

    @property
    def net(self) -> Net:
        """The teacher's network, which may be learning in a phase of its own, and now stands still."""
        return self._net[0]

    @property
    def classifier(self) -> nn.Linear:
        """The teacher's own head."""
        found = network_in(self.net).get_submodule(self.head_path)
        assert isinstance(found, nn.Linear)
        return found

    def _grid(self, path: str, shape: torch.Size) -> Grid | None:
        if len(shape) in (2, 4):
            return None
        grid = self.config.grid or grid_of(network_in(self.net))
        if len(shape) != 3 or grid is None or grid[0] * grid[1] > shape[1]:
            raise ShapeError(
                f"stage {path!r} gives {list(shape)}, with patches {grid}: prompt blocks need maps "
                "[B, C, H, W], vectors [B, C] or tokens [B, T, C] of a known grid; set stages or grid"
            )
        return grid

    # How it starts, and follows a teacher that learns tasks

    def _fresh(self, generator: torch.Generator) -> tuple[nn.ModuleList, nn.Linear]:
        with seeded(generator):
            blocks = nn.ModuleList(self.config.block(channels, grid) for channels, grid in self.places)
            head = copy.deepcopy(self.classifier).cpu().requires_grad_(True)
            head.reset_parameters()
        return blocks, head

    @torch.no_grad()
    def follow(self, *, anew: bool) -> None:
        """Take over what the teacher has become.

        Args:
            anew: also where the path has learnt by itself: the stages of ``plus``, and with the identity
                start the head. Else only what of the teacher is no stage, such as a task's prompts.
        """
        if anew and self.config.init == "identity":
            self.head.load_state_dict(self.classifier.state_dict())
        if self.config.plus:
            learnt = None if anew or self.copy is None else stages_in(self.copy).state_dict()
            self.copy = own_copy(self.net, self.head_path)
            if learnt is not None:
                stages_in(self.copy).load_state_dict(learnt)
            self.train(self.training)

    def start_task(self, task: int, generator: torch.Generator) -> None:
        """Begin again where ``per_task`` says so."""
        self.task = task
        if task and self.config.per_task == "restart":
            blocks, head = self._fresh(generator)
            self.blocks.load_state_dict(blocks.state_dict())
            self.head.load_state_dict(head.state_dict())
            self.follow(anew=True)

    def finish_lesson(self) -> None:
        """The teacher has learnt its task."""
        self.follow(anew=self.task == 0 or self.config.per_task == "restart")

    # At work

    def train(self, mode: bool = True) -> SecondPath:
        """Switch blocks and head; of a copy nothing but batch norm ever trains as such."""
        super().train(mode)
        if self.copy is not None:
            self.copy.eval()
            for part in self.copy.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm) and self.config.plus_norm == "train":
                    part.train(mode)
        return self

    def forward(self, batch: Batch, said: Outputs, taps: tuple[str, ...] = ()) -> Outputs:
        """``said`` with the answer of the path ``prompt`` [B, C], which carries a graph.

        Raises:
            ConfigError: the teacher is learning meanwhile.
        """
        net = self.net if self.copy is None else self.copy
        if self.copy is None and net.training:
            raise ConfigError(
                "a second path needs a teacher that stands still: use schedule teacher_then_student"
            )
        edits: dict[str, Edit] = dict(zip(self.edited, self.blocks, strict=True))
        prefix = f"network.{self.head_path}" if network_in(net) is not net else self.head_path
        weights: dict[str, Tensor] = {f"{prefix}.{name}": p for name, p in self.head.named_parameters()}
        with edited(network_in(net), edits):
            own: Outputs = functional_call(net, weights, (batch, taps), tie_weights=False)
        logits = own.logits if self.order is None else own.logits[:, self.order]
        return replace(said, paths={**said.paths, PATH: replace(own, logits=logits, losses={})})

    def terms(self, said: Outputs, student: Outputs, batch: Batch, at: Progress) -> dict[str, Tensor]:
        """L_P in its parts: labels [B], the original path's and the student's logits [B, C].

        ``{"labels": w_ce * cross entropy, "kd": w_teacher * T² KL(teacher ‖ path), "student": w_student *
        T² KL(student ‖ path)}``, each a mean over the batch.
        """
        config, z = self.config, said.along(PATH).logits
        tau = config.temperature
        return {
            "labels": config.w_ce * losses.cross_entropy(z, batch.labels, mask=batch.labelled),
            "kd": config.w_teacher * losses.kl_divergence(z, said.logits, tau),
            "student": config.w_student * losses.kl_divergence(z, student.soft, tau),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Blocks and head at ``lr`` times the student's rate, a copy at ``plus_lr`` times."""
        own = [*self.blocks.parameters(), *self.head.parameters()]
        copied = [] if self.copy is None else [p for p in self.copy.parameters() if p.requires_grad]
        return [
            {"name": "prompt path", "params": own, "lr_scale": self.config.lr},
            {"name": "copied stages", "params": copied, "lr_scale": self.config.plus_lr},
        ]


class DualPath(Wrapped):
    """A teacher with a second path: every question goes to the teacher, ``adapting`` gives the path.

    Args:
        teacher: the network as it is.
        path: its second path; not registered.
    """

    def __init__(self, teacher: Net, path: SecondPath) -> None:
        super().__init__(teacher)
        self._path = (path,)

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """The teacher's outputs."""
        outputs: Outputs = self.inner(batch, taps, teacher)
        return outputs

    def predict(self, outputs: Outputs) -> Tensor:
        """See ``Net.predict``."""
        return self.inner.predict(outputs)

    def sharable(self) -> nn.Module | None:
        """See ``Net.sharable``: a copy is made of a whole teacher."""
        return None if self._path[0].config.plus else self

    def observe(self, batches: Iterable[Batch]) -> None:
        """See ``Net.observe``."""
        self.inner.observe(batches)

    def start_task(self, task: int, generator: torch.Generator) -> None:
        """Both get ready; the teacher draws first, as it would alone."""
        super().start_task(task, generator)
        self._path[0].start_task(task, generator)

    def finish_task(self) -> None:
        """The teacher settles what it learnt, and the path follows."""
        super().finish_task()
        self._path[0].finish_lesson()

    def adapting(self) -> SecondPath:
        """The second path."""
        return self._path[0]


def network_in(net: Net) -> nn.Module:
    """The network that paths are read in: as for taps."""
    network = getattr(net, "network", net)
    assert isinstance(network, nn.Module)
    return network


def stages_of(network: nn.Module) -> tuple[str, ...]:
    """Paths of the stages: ``layer1``, ``layer2``, ..., or what ``stages``, ``blocks`` ... hold.

    Raises:
        ShapeError: none of them is there.
    """
    children = dict(network.named_children())
    numbered = [name for name in children if re.fullmatch(r"layer\d+", name)]
    if numbered:
        return tuple(numbered)
    for name in ("stages", "blocks", "layers", "hidden"):
        parts = [part for part, _ in children[name].named_children()] if name in children else []
        if parts:
            return tuple(f"{name}.{part}" for part in parts)
    raise ShapeError(
        f"{type(network).__name__} has no stages under a usual name (layer1, stages, blocks, layers): set "
        f"stages to module paths inside it; it holds {', '.join(children) or 'nothing'}"
    )


def classifier_of(network: nn.Module, path: str | None, classes: int) -> str:
    """The path of the classifier: ``path``, or the last linear layer.

    Raises:
        ShapeError: no linear layer to ``classes`` there.
    """
    linear = {name: part for name, part in network.named_modules() if isinstance(part, nn.Linear)}
    found = next(reversed(linear), "") if path is None else resolve(network, path)
    if found not in linear or (classes and linear[found].out_features != classes):
        raise ShapeError(
            f"the classifier of {type(network).__name__} should be a linear layer to {classes} classes but "
            f"{found!r} is not: set head to its module path"
        )
    return found


def grid_of(network: nn.Module) -> Grid | None:
    """Height and width of a transformer's patches, where its patch embedding says so."""
    for part in network.modules():
        size = getattr(part, "grid_size", None)
        if isinstance(size, tuple | list) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


@torch.no_grad()
def shapes_of(net: Net, paths: Sequence[str], spec: Spec) -> list[torch.Size]:
    """Shapes of the outputs at ``paths`` for one image; modes and buffers of ``net`` stay as they are."""
    modes = {part: part.training for part in net.modules()}
    zero = torch.zeros(1, dtype=torch.int64)
    like = next(net.parameters(), torch.zeros(()))
    image = torch.zeros(1, spec.channels, spec.size, spec.size, device=like.device, dtype=like.dtype)
    query = None if net.query_dim is None else image.new_zeros(1, net.query_dim)
    try:
        with capture(network_in(net), paths) as features:
            net.eval()(Batch(inputs=image, labels=zero, index=zero, view=zero, query=query))
    finally:
        for part, mode in modes.items():
            part.training = mode
    return [features[path].shape for path in paths]


def stages_in(net: Net) -> nn.Module:
    """What of a network counts as its stages: of a prompted transformer the backbone, else all."""
    return net.backbone if isinstance(net, PromptedViT) else network_in(net)


def own_copy(net: Net, head: str) -> Net:
    """A copy of ``net`` whose stages learn, and are saved with what learns.

    The classifier at ``head`` does not learn: another head stands in its place.
    """
    own = copy.deepcopy(net).requires_grad_(False)
    for part in own.modules():
        if getattr(part, "constant", False):
            part.constant = False  # type: ignore[assignment]
    stages_in(own).requires_grad_(True)
    network_in(own).get_submodule(head).requires_grad_(False)
    return own
