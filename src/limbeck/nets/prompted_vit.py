"""A frozen timm vision transformer that learns through prompts.

B batch, N tokens, D width, C classes. The sequence is [KD token (v2)], [prepended prompts], timm's own
tokens, [KD token (v3)]; the backbone's code runs as it is wherever a block has no prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from limbeck.contracts import Batch, Net, Outputs
from limbeck.errors import ConfigError, ShapeError
from limbeck.nets.heads import build_head
from limbeck.nets.kd_prompts import KDBank, strict_mask
from limbeck.nets.prefix import (
    Additive,
    Prefix,
    check_promptable,
    promptable,
    prompted_block,
)
from limbeck.nets.prompt_map import PromptMap
from limbeck.nets.prompts import PromptSet, TaskPrompts
from limbeck.nets.taps import resolve


class _Layout(NamedTuple):
    """Where the groups of tokens stand: prepended prompts, then timm's own; the KD token at ``kd_at``."""

    prepend_start: int
    own_start: int
    own: int
    kd_at: int | None

    def read(self) -> tuple[int, ...]:
        """Positions of the class token and the KD token."""
        return (self.own_start,) if self.kd_at is None else (self.own_start, self.kd_at)

    def left(self) -> _Layout:
        """The layout when nothing but the tokens of ``read`` is left."""
        return _Layout(0, 0, 1, None if self.kd_at is None else 1)


class PromptedViT(Net):
    """A frozen backbone, its task prompts, and optionally KD prompts or mapped teacher prompts.

    Args:
        backbone: timm's ``VisionTransformer``; frozen here.
        prompts: the built prompt learner.
        classes: C, over all tasks.
        generator: for the heads.
        query_dim: width of ``batch.query``; None = the backbone's own.
        kd_prompts: KD token and prompts; they bring the second head.
        prompt_map: which teacher prompts are mapped; brings the second head.
        share: weight of the second head in the prediction, in [0, 1].
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        prompts: TaskPrompts,
        classes: int,
        *,
        generator: torch.Generator,
        query_dim: int | None = None,
        kd_prompts: KDBank | None = None,
        prompt_map: PromptMap | None = None,
        share: float = 0.5,
    ) -> None:
        super().__init__()
        width = backbone.embed_dim
        frozen: Any = backbone.requires_grad_(False).eval()
        frozen.constant = True
        self.backbone = frozen
        self.prompts, self.kd_prompts, self.share = prompts, kd_prompts, share
        reads = prompts.needs_query or prompt_map is not None
        self.query_dim = (width if query_dim is None else query_dim) if reads else None
        self.head = build_head(prompts.head, width, classes, generator)
        two_heads = kd_prompts is not None or prompt_map is not None
        self.kd_head = build_head(prompts.head, width, classes, generator) if two_heads else None
        self.prompt_map_config = prompt_map
        self.reads_prompts = self.keeps_teacher = prompt_map is not None
        self._map_seed = int(torch.randint(2**31, (), generator=generator)) if prompt_map else 0
        self.mapping: nn.Module | None = None
        self.teacher_prompts: TaskPrompts | None = None
        self._teachers: tuple[TaskPrompts, ...] = ()  # the live one; in a tuple, so that it is no submodule
        depth = len(backbone.blocks)
        # Behind each block, since a prompted one is not called as such: where hooks find its output.
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(depth))
        self._taps = {f"blocks.{n}": n % depth for n in range(-depth, depth)} | {"norm": depth}
        self._check_blocks()

    def _check_blocks(self) -> None:
        prompted = set(self.prompts.blocks)
        if self.kd_prompts is not None:
            strict = self.kd_prompts.config.strict
            prompted |= set(range(len(self.backbone.blocks))) if strict else set(self.kd_prompts.prefixes())
        if self.prompt_map_config is not None:
            self.prompt_map_config.check(len(self.backbone.blocks))
            prompted |= set(self.prompt_map_config.blocks)
        for block in sorted(prompted):
            check_promptable(self.backbone.blocks[block], f"blocks.{block}")
        # Nothing reads the other tokens of the last block, unless they are tapped or pooled.
        self._reads_two = (
            bool(prompted)
            and not self.prompts.reads_prompts
            and self.backbone.has_class_token
            and self.backbone.global_pool == "token"
            and promptable(self.backbone.blocks[-1])
        )
        if self.prompts.additive and not self.backbone.has_class_token:
            raise ShapeError("additive prompts need a class token, and this backbone has none")

    @property
    def width(self) -> int:
        """D, the width of the backbone."""
        return int(self.backbone.embed_dim)

    def train(self, mode: bool = True) -> PromptedViT:
        """Switch prompts and heads; the backbone and a kept teacher's prompts stay in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        if self.teacher_prompts is not None:
            self.teacher_prompts.eval()
        return self

    def sharable(self) -> nn.Module:
        """See ``Net.sharable``: prompts and heads stay whole."""
        whole: nn.Module = self.backbone
        return whole

    @torch.no_grad()
    def query(self, images: Tensor) -> Tensor:
        """The backbone's own feature of ``images``, without prompts and without gradient, [B, D].

        The class token behind the final norm; the pooled tokens where the backbone has no class token.
        """
        feature: Tensor = self.backbone(images)
        return feature

    def forward(
        self,
        batch: Batch,
        taps: tuple[str, ...] = (),
        teacher: Outputs | None = None,
        *,
        logits: bool = True,
    ) -> Outputs:
        """One pass.

        Args:
            batch: images [B, channels, H, W]; ``query`` [B, query_dim], or None to compute the own one.
            taps: ``blocks.N`` (all tokens of that block's output) and ``norm`` (all tokens behind the final
                norm); negative numbers count from the end.
            teacher: its ``prompts`` are read while mapped prompts are trained, and nowhere else.
            logits: False = stop behind the last tap; ``logits`` is then [B, 0].

        Raises:
            ShapeError: a tap that is not there, or a query that does not fit.
        """
        wanted = {tap: self._block_of(tap) for tap in taps}
        chosen, mapped = self._prompts(batch, teacher)
        x, at = self._sequence(batch.inputs, chosen)
        shared = {} if self.kd_prompts is None else self.kd_prompts.prefixes()
        depth = len(self.backbone.blocks)
        last = depth if logits or depth in wanted.values() else max(wanted.values(), default=-1) + 1
        short = self._reads_two and logits and max(wanted.values(), default=-1) < depth - 1
        outputs: dict[int, Tensor] = {}
        for number in range(last):
            task = [group[number] for group in (chosen.prefix, mapped) if number in group]
            read = at.read() if short and number == depth - 1 else None
            x = self._block(number, x, task, shared.get(number), chosen.additive.get(number), at, read)
            x = self.blocks[number](x)
            if number in wanted.values():
                outputs[number] = x
        if last == depth:
            x = outputs[depth] = self.backbone.norm(x)
        none = x.new_empty(x.shape[0], 0), None
        z, z_kd = self._logits(x, at.left() if short else at) if logits else none
        losses = {"prompt": chosen.loss} if self.training and chosen.loss is not None else {}
        return Outputs(
            logits=z,
            soft_logits=z_kd,
            features={tap: outputs[number] for tap, number in wanted.items()},
            losses=losses,
            prompts=chosen.prefix,
        )

    def _block_of(self, tap: str) -> int:
        """The block that a tap names; the number behind the last block is the final norm."""
        if tap not in self._taps:
            resolve(self.backbone, tap)
            raise ShapeError(
                f"tap {tap!r} is inside a prompted transformer: tap 'norm' or blocks.0 to blocks.-1"
            )
        return self._taps[tap]

    def _prompts(self, batch: Batch, teacher: Outputs | None) -> tuple[PromptSet, Mapping[int, Prefix]]:
        """The task prompts of the batch, and the teacher's prompts mapped to this network."""
        asks = self.query_dim is not None
        query = self._query(batch) if asks else batch.inputs.new_empty(batch.inputs.shape[0], 0)
        # Choosing is done in float32: half precision would make ties among the keys.
        with torch.autocast(batch.inputs.device.type, enabled=False):
            chosen: PromptSet = self.prompts(query)
            if self.prompt_map_config is None:
                return chosen, {}
            if self.mapping is None or self.teacher_prompts is None:
                raise ConfigError("mapped prompts have no teacher: name one, or call attach_teacher")
            if not self.training:
                with torch.no_grad():
                    theirs = self.teacher_prompts(query).prefix
            elif teacher is not None and teacher.prompts:
                theirs = teacher.prompts
            else:
                raise ConfigError("mapped prompts are trained with the teacher's prompts, but it gave none")
            mapped: Mapping[int, Prefix] = self.mapping(theirs)
            return chosen, mapped

    def _query(self, batch: Batch) -> Tensor:
        if batch.query is not None:
            if batch.query.shape[1] != self.query_dim:
                raise ShapeError(
                    f"the query is {batch.query.shape[1]} wide but the prompt keys are {self.query_dim}: "
                    "give the features of the network whose width the keys were built for"
                )
            return batch.query
        if self.query_dim != self.width:
            raise ShapeError(
                f"prompt keys are {self.query_dim} wide and the backbone {self.width}, so it cannot make its "
                "own query: give batch.query"
            )
        return self.query(batch.inputs)

    def _sequence(self, images: Tensor, chosen: PromptSet) -> tuple[Tensor, _Layout]:
        """The tokens that enter block 0, and where they stand."""
        vit, kd = self.backbone, self.kd_prompts
        own = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        parts = [own] if chosen.prepend is None else [chosen.prepend.to(own.dtype), own]
        at_start = kd is not None and kd.config.position == "start"
        if kd is not None:
            parts.insert(0 if at_start else len(parts), kd.tokens(own.shape[0]).to(own.dtype))
        length = sum(part.shape[1] for part in parts)
        prepended = 0 if chosen.prepend is None else chosen.prepend.shape[1]
        kd_at = None if kd is None else (0 if at_start else length - 1)
        x = torch.cat(parts, dim=1) if len(parts) > 1 else own
        return x, _Layout(int(at_start), int(at_start) + prepended, own.shape[1], kd_at)

    def _block(
        self,
        number: int,
        x: Tensor,
        task: list[Prefix],
        shared: Prefix | None,
        additive: Prefix | None,
        at: _Layout,
        read: tuple[int, ...] | None,
    ) -> Tensor:
        """One block with its task prompts, its KD prompts and its additive vectors (``prompted_block``)."""
        mask = None
        if self.kd_prompts is not None and self.kd_prompts.config.strict and at.kd_at is not None:
            task_rows = sum(keys.shape[-2] for keys, _ in task)
            kd_rows = 0 if shared is None else shared[0].shape[-2]
            mask = strict_mask(x.shape[1], at.kd_at, task_rows, kd_rows, x.device)
        groups = task if shared is None else [*task, shared]
        vectors = None if additive is None else Additive(at.own_start, *additive)
        block = self.backbone.blocks[number]
        return prompted_block(block, x, groups, additive=vectors, mask=mask, read=read)

    def _logits(self, x: Tensor, at: _Layout) -> tuple[Tensor, Tensor | None]:
        """Both heads' logits from the tokens [B, N, D] behind the final norm."""
        vit = self.backbone
        if self.prompts.reads_prompts:
            feature = vit.fc_norm(x[:, at.prepend_start : at.own_start].mean(dim=1))
        else:
            feature = vit.forward_head(x[:, at.own_start : at.own_start + at.own], pre_logits=True)
        z = self.head(feature)
        if self.kd_head is None:
            return z, None
        soft_feature = feature if at.kd_at is None else vit.fc_norm(x[:, at.kd_at])
        return z, self.kd_head(soft_feature)

    def predict(self, outputs: Outputs) -> Tensor:
        """What the network answers: logits [B, C], (1 - share) of the class head and share of the second."""
        if outputs.soft_logits is None:
            return outputs.logits
        return (1 - self.share) * outputs.logits + self.share * outputs.soft_logits

    def start_task(self, task: int, generator: torch.Generator) -> None:
        """Grow the task prompts; KD prompts, mappings and heads go on as they are."""
        self.prompts.start_task(task, generator)

    def finish_task(self) -> None:
        """Settle the task prompts, and bring the kept copy of the teacher's up to date."""
        self.prompts.finish_task()
        for live in self._teachers:
            if self.teacher_prompts is not None:
                self.teacher_prompts.load_state_dict(live.state_dict())

    def key_accuracy(self, query: Tensor, task: int) -> Tensor | None:
        """See ``Net.key_accuracy``."""
        return self.prompts.key_accuracy(query, task)

    def attach_teacher(self, teacher: Net) -> None:
        """Build the mapping of the teacher's prompts, and keep a frozen copy of these for test time.

        Without mapped prompts nothing is kept.

        Raises:
            ShapeError: the teacher has no prompts in a mapped block, or is too narrow for the bank.
        """
        if self.prompt_map_config is None:
            return
        if not isinstance(teacher, PromptedViT):
            raise ShapeError(
                f"prompt_map needs a prompted transformer as teacher, not {type(teacher).__name__}: set "
                "teacher to prompted_vit, or leave prompt_map out"
            )
        generator = torch.Generator().manual_seed(self._map_seed)
        mapping = self.prompt_map_config.build(teacher.prompts, self.width, generator)
        self.mapping = mapping.to(self.head.weight.device)
        self.teacher_prompts = copy.deepcopy(teacher.prompts).requires_grad_(False).eval()
        self._teachers = (teacher.prompts,)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, as ``{"name", "params", "lr_scale"}`` for each part that has something to learn."""
        later = self.kd_prompts is not None and self.prompts.task > 0
        kd_scale = self.kd_prompts.config.later_lr if self.kd_prompts is not None and later else 1.0
        parts: list[tuple[str, nn.Module | None, float]] = [
            ("prompts", self.prompts, 1.0),
            ("kd_prompts", self.kd_prompts, kd_scale),
            ("prompt_map", self.mapping, 1.0),
            ("head", self.head, 1.0),
            ("kd_head", self.kd_head, 1.0),
        ]
        groups = []
        for name, module, scale in parts:
            params = [] if module is None else [p for p in module.parameters() if p.requires_grad]
            if params:
                groups.append({"name": name, "params": params, "lr_scale": scale})
        return groups
