"""A language model that learns to be several: nested networks in its teacher's own weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.contracts import Batch, Course, Nested, Net, Outputs, Progress, Spec, Student
from limbeck.engine import seeds
from limbeck.errors import ConfigError, unknown
from limbeck.losses.elastic import (
    Mode,
    budget_probabilities,
    gumbel_temperature,
    router_logit_scale,
    router_loss,
)
from limbeck.nets.causal_lm import CausalLM, TextInput, answer, language_model
from limbeck.nets.elastic import (
    AXES,
    ElasticLM,
    Masks,
    Options,
    Router,
    Sizes,
    expected_parameters,
    gumbel_noise,
    masked,
    rounded_options,
    route,
    routed_masks,
)
from limbeck.nets.importance import Importance, rank_layers, sort_by_importance, width_importance

Order = Literal["importance", "random"]
CALIBRATED = 16  # rows that importance is measured on at a time
ROUNDING = 0.005
"""A budget is met by so much more or less of the parameters: half of the percent that it is named by."""


@dataclass(frozen=True, kw_only=True)
class ElasticStudent(Student):
    """The teacher's network, trained so that smaller ones within it can be cut out (Nemotron Elastic).

    Before the training its channels, neurons, heads and layers are ranked by importance; a smaller network
    keeps the first of each. In a step every text draws a budget, and is read by that budget's network, whose
    sizes a router chooses and learns. All of them share their weights, and learn from the frozen teacher by
    any objective. The student itself, as it is measured and saved, is the network of the first budget; the
    others stand beside it by name.

    Attributes:
        needs_teacher: it is made of its teacher's weights.
        budgets: by falling size the share of the teacher's parameters that each network may have, in (0, 1].
        hidden: what the router chooses embedding channels from, as shares of the teacher's, in (0, 1].
        ffn: the same of the neurons of each feed-forward layer.
        heads: the same of the query heads of each layer; whole numbers of them for each key head.
        layers: the same of the layers.
        sizes: of each budget's network, in place of a router; empty = a router chooses.
        draws: how often each budget is drawn in the last part of the training; empty = equally often, as
            before.
        late: share of the steps that is that last part, in [0, 1].
        order: ``importance``; or ``random``, to show that it matters.
        calibration: rows of the data whose counted tokens importance is measured on; the paper's is 1024.
        router_weight: λ >= 0, factor of the router's loss: by how much of the teacher's parameters it misses
            its budget.
        router_rate: its learning rate as a multiple of ``scenario.optim``'s; 1e-2 to 9e-5 in the paper.
        router_width: its hidden units.
        mode: ``soft``: while it learns, a text is read under the mean of the masks that the router may
            choose; ``hard``: under the most probable, times its logit.
        temperature: τ of the Gumbel softmax at the first step and at the last, > 0.
        scale: factor of the router's logits at the first step and at the last, > 0.

    Raises:
        ConfigError: a field out of its range.

    Source: Nemotron Elastic (arXiv 2511.16664), sections 3 and 4.
    Differs: see ``nets.elastic`` and ``nets.importance``. The first part of the training is not shorter in
    tokens of context than the last.
    """

    needs_teacher: ClassVar[bool] = True

    budgets: tuple[float, ...] = (1.0, 0.75, 0.5)
    hidden: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875, 1.0)
    ffn: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875, 1.0)
    heads: tuple[float, ...] = (0.5, 0.75, 1.0)
    layers: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875, 1.0)
    sizes: tuple[Sizes, ...] = ()
    draws: tuple[float, ...] = ()
    late: float = 0.4
    order: Order = "importance"
    calibration: int = 1024
    router_weight: float = 1.0
    router_rate: float = 111.0
    router_width: int = 256
    mode: Mode = "soft"
    temperature: tuple[float, float] = (1.0, 0.05)
    scale: tuple[float, float] = (1.0, 10.0)

    def __post_init__(self) -> None:
        self._check_shares()
        for name, kind in (("order", Order), ("mode", Mode)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, getattr(self, name), get_args(kind))
        for name in ("calibration", "router_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least 1")
        if not 0 <= self.late <= 1:
            raise ConfigError(f"late is {self.late}: allowed are shares from 0 to 1")
        if not self.router_weight >= 0:
            raise ConfigError(f"router_weight is {self.router_weight}: allowed are values of at least 0")
        for name, values in {"router_rate": (self.router_rate,), "temperature": self.temperature,
                             "scale": self.scale}.items():  # fmt: skip
            if not all(value > 0 for value in values):
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values above 0")

    def _check_shares(self) -> None:
        for name in ("budgets", *AXES):
            shares = getattr(self, name)
            if not shares or not all(0 < share <= 1 for share in shares):
                raise ConfigError(f"{name} is {list(shares)}: give at least one share above 0, at most 1")
        if any(a <= b for a, b in pairwise(round(100 * budget) for budget in self.budgets)):
            raise ConfigError(
                f"budgets is {list(self.budgets)} but must fall by 0.01 or more from each to the next"
            )
        for name in ("sizes", "draws"):
            given = getattr(self, name)
            if given and len(given) != len(self.budgets):
                raise ConfigError(
                    f"{name} has {len(given)} entries but budgets {len(self.budgets)}: give each budget one"
                )
        if self.draws:
            budget_probabilities(self.draws)

    def names(self) -> tuple[str, ...]:
        """What the networks are called."""
        return tuple(f"budget-{round(100 * budget)}" for budget in self.budgets)

    def input_spec(self) -> TextInput:
        """No pixels."""
        return TextInput()

    def reads_text(self) -> bool:
        """It does."""
        return True

    def build(self, spec: Spec, generator: torch.Generator) -> Net:
        """See ``Network.build``; it has weights once a teacher is attached."""
        return ElasticNet(self, int(torch.randint(2**62, (), generator=generator)))


class ElasticNet(Net):
    """``ElasticStudent`` at work.

    Attributes:
        parent: the teacher's network, its widths in order of importance once it is prepared.
        router: chooses sizes; None where they are given.
    """

    keeps_teacher = True

    def __init__(self, plan: ElasticStudent, seed: int) -> None:
        super().__init__()
        self.plan, self.seed, self.at = plan, seed, Progress()
        self.parent: CausalLM
        self.router: Router | None = None

    def attach_teacher(self, teacher: Net) -> None:
        """Take over the teacher's form, and its weights as they are now.

        Raises:
            ConfigError: the teacher is no single model of the Llama family, or has no networks for the
                budgets.
        """
        self._teacher = (language_model(teacher),)  # unregistered: it is the teacher's
        self.parent = copy.deepcopy(self._teacher[0]).float().requires_grad_(True).train()
        network: Any = self.parent.network
        self._settle(torch.arange(network.config.num_hidden_layers))
        if not self.plan.sizes:
            draws = seeds.generator(self.seed, "router")
            router = Router(len(self.plan.budgets), self.options, draws, self.plan.router_width)
            self.router = router.to(self.place)
        check_budgets(self.elastic, self.plan, self.options)

    def prepare(self, course: Course) -> None:
        """Take over the weights of the teacher, which stands still now, in order of importance."""
        network = self.parent.network
        network.load_state_dict(self._teacher[0].network.state_dict())
        found = course.once("elastic", lambda: self._ranked(course))
        scores = {name: torch.tensor(found[name], device=self.place) for name in ("hidden", "ffn", "heads")}
        network.load_state_dict(sort_by_importance(network, Importance(**scores)).state_dict())
        self._settle(torch.tensor(found["layer_ranks"]))

    def _ranked(self, course: Course) -> dict[str, Any]:
        """The score of each width, and the rank of each layer, as plain data."""
        rank = self._by_chance if self.plan.order == "random" else self._by_importance
        widths, layer_ranks = rank(course, course.generator("importance"))
        return {
            "hidden": widths.hidden.tolist(), "ffn": widths.ffn.tolist(), "heads": widths.heads.tolist(),
            "layer_ranks": layer_ranks.tolist(),
        }  # fmt: skip

    def _by_importance(self, course: Course, draws: torch.Generator) -> tuple[Importance, Tensor]:
        chosen = course.index[torch.randperm(len(course.index), generator=draws)[: self.plan.calibration]]
        batches = list(course.batches(chosen, CALIBRATED))
        texts = [batch.inputs for batch in batches]
        about = [counted_of(batch) for batch in batches], [batch.segments for batch in batches]
        network = self.parent.network
        return width_importance(network, texts, *about), rank_layers(network, texts, *about)

    def _by_chance(self, course: Course, draws: torch.Generator) -> tuple[Importance, Tensor]:
        full = self.elastic.full
        sizes = ((full.hidden,), (full.layers, full.ffn), (full.layers, full.heads))
        scores = (torch.rand(size, generator=draws) for size in sizes)
        return Importance(*scores), torch.randperm(full.layers, generator=draws)

    def _settle(self, layer_ranks: Tensor) -> None:
        """Take the ranks of the layers; the widths stand in order."""
        elastic = ElasticLM(self.parent.network, layer_ranks.to(self.place))
        self._elastic = (elastic,)  # unregistered: its weights are the parent's
        self.options = rounded_options(elastic, {axis: getattr(self.plan, axis) for axis in AXES})
        self.choices = elastic.option_masks(self.options)

    @property
    def elastic(self) -> ElasticLM:
        """The parent as a holder of nested networks."""
        return self._elastic[0]

    @property
    def place(self) -> torch.device:
        """Where the weights are."""
        return next(self.parent.parameters()).device

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The router learns at a rate of its own."""
        if self.router is None:
            return []
        return [{"params": list(self.router.parameters()), "lr_scale": self.plan.router_rate}]

    def start_step(self, at: Progress) -> None:
        """See ``Net.start_step``."""
        self.at = at

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        """In training each text through the network of a budget that it draws; else the first budget's.

        Args:
            batch: token ids [B, T], with ``rows`` and maybe ``segments``.
            taps: module paths inside the parent.
            teacher: not read.
        """
        projects = self.parent.projects
        if not self.training:
            cut = self.elastic.cut(self.sizes(0))
            return self.elastic.run(cut, lambda small: answer(small, batch, taps, logits=projects))
        draws = seeds.generator(self.seed, "step", self.at.task, self.at.step)
        start, count = batch.place or (0, len(batch.inputs))
        drawn = torch.multinomial(self.chances(), count, replacement=True, generator=draws)
        masks, losses = self.masks(drawn.to(self.place), draws)
        own = slice(start, start + len(batch.inputs))
        masks = Masks(**{axis: getattr(masks, axis)[own] for axis in AXES})
        with masked(self.parent.network, masks):
            said = answer(self.parent.network, batch, taps, logits=projects)
        return Outputs(
            logits=said.logits, features=said.features, losses=losses, hidden=said.hidden,
            unembedding=said.unembedding,
        )  # fmt: skip

    def sharable(self) -> None:
        """See ``Net.sharable``: smaller networks run on parts of the weights."""

    def chances(self) -> Tensor:
        """How probable each budget is at this step [n_b]."""
        late = self.at.step >= (1 - self.plan.late) * self.at.steps
        return budget_probabilities(
            self.plan.draws if late and self.plan.draws else [1] * len(self.plan.budgets)
        )

    def masks(self, drawn: Tensor, draws: torch.Generator) -> tuple[Masks, dict[str, Tensor]]:
        """The masks of texts that drew the budgets ``drawn`` [B], and the router's loss."""
        if self.router is None:
            each = [self.elastic.masks(sizes) for sizes in self.plan.sizes]
            whole = {axis: torch.stack([getattr(masks, axis) for masks in each]) for axis in AXES}
            return Masks(**{axis: masks[drawn] for axis, masks in whole.items()}), {}
        logits = self.router(F.one_hot(drawn, len(self.plan.budgets)).float())
        probabilities = route(
            logits, gumbel_noise(logits, draws), gumbel_temperature(self.at, *self.plan.temperature),
            router_logit_scale(self.at, *self.plan.scale),
        )  # fmt: skip
        budgets = torch.tensor(self.plan.budgets, device=drawn.device)[drawn]
        missed = router_loss(expected_parameters(self.elastic, self.options, probabilities), budgets).mean()
        masks = routed_masks(self.choices, logits, probabilities, self.plan.mode)
        return masks, {"router": self.plan.router_weight * missed}

    def sizes(self, budget: int) -> Sizes:
        """The sizes of that budget's network as the router stands, without noise."""
        if self.router is None:
            return self.plan.sizes[budget]
        return self.router.choose(torch.eye(len(self.plan.budgets), device=self.place)[budget])

    def deployed(self) -> Net:
        """The network of the first budget."""
        return self._nested(0).net

    def nested(self) -> Mapping[str, Nested]:
        """The network of each budget."""
        return {name: self._nested(budget) for budget, name in enumerate(self.plan.names())}

    def _nested(self, budget: int) -> Nested:
        sizes, elastic = self.sizes(budget), self.elastic
        net = CausalLM(elastic.slice_model(sizes))
        net.tokenizer = self.parent.tokenizer
        about = {
            "budget": self.plan.budgets[budget], "share": share(elastic, sizes), "sizes": asdict(sizes),
            "kept_layers": list(elastic.cut(sizes).layers),
        }  # fmt: skip
        return Nested(net.to(self.place), about)

    def save(self, folder: Path) -> bool:
        """Write the first budget's network to ``folder``, and every other one to a folder of its name in it;
        ``from_pretrained`` loads each."""
        for budget, (name, nested) in enumerate(self.nested().items()):
            nested.net.save(folder / name if budget else folder)
        return True


def counted_of(batch: Batch) -> Tensor:
    """True [B, T] at the tokens of a batch that count."""
    assert batch.rows is not None
    counts = torch.zeros_like(batch.inputs, dtype=torch.bool).flatten()
    return counts.index_fill(0, batch.rows, True).view_as(batch.inputs)


def share(elastic: ElasticLM, sizes: Sizes) -> float:
    """A nested network's part of the parent's parameters."""
    return elastic.parameters_of(sizes) / elastic.parameters_of(elastic.full)


def check_budgets(elastic: ElasticLM, plan: ElasticStudent, options: Options) -> None:
    """Raise ``ConfigError`` unless there is a network for each budget."""
    if plan.sizes:
        for place, (sizes, budget) in enumerate(zip(plan.sizes, plan.budgets, strict=True)):
            elastic.check(sizes)
            if share(elastic, sizes) > budget + ROUNDING:
                raise ConfigError(
                    f"sizes.{place} has {share(elastic, sizes):.3f} of the teacher's parameters but its "
                    f"budget is {budget}: make it smaller, or raise the budget"
                )
        return
    ends = [Sizes(**{axis: end(getattr(options, axis)) for axis in AXES}) for end in (min, max)]
    least, most = (share(elastic, sizes) for sizes in ends)
    for budget in plan.budgets:
        if not least - ROUNDING <= budget <= most + ROUNDING:
            raise ConfigError(
                f"budgets has {budget} but the networks that the router can choose have {least:.3f} to "
                f"{most:.3f} of the teacher's parameters: change it, or give other shares of hidden, ffn, "
                "heads or layers"
            )
    for hidden in options.hidden:
        for heads in options.heads:
            elastic.check(Sizes(hidden, options.ffn[0], heads, options.layers[0]))
