"""Does a student that comes nearer to its teacher move away from the truth? An experiment with an oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.contracts import Net, Outputs, Selection, Student
from limbeck.data.tokens import TokenBatches
from limbeck.engine.fit import autocast
from limbeck.engine.run import Run
from limbeck.engine.seeds import derive
from limbeck.errors import ConfigError
from limbeck.metrics.hacking import Kind, distances, hacking_report, power_law
from limbeck.metrics.statistics import mean_interval
from limbeck.scenarios.language import Desk, Language, Tokens, check_own
from limbeck.scenarios.pair import Pair
from limbeck.scenarios.token_figures import CHUNK
from limbeck.scenarios.written import Texts, Writer, check_prompts, model_of
from limbeck.students.llama import LlamaStudent


@dataclass(frozen=True, kw_only=True)
class TeacherHacking(Language):
    """An oracle stands for the truth: teacher and student learn its texts, then the student the teacher.

    The oracle learns the data's texts. Teacher and student both begin with texts that it writes; then the
    student is distilled on further prompts, and ``writing`` says whose texts stand behind them: a teacher's
    that are kept (offline) or new each time, or the student's own; without it they are the oracle's. Again
    and again its distance from the teacher (proxy) and from the oracle (golden) is measured, on held-out
    prompts. What was seen stands in ``result.json`` under ``hacking``.

    Attributes:
        epochs: rounds of the distillation.
        epoch_steps: see ``language``; of all stages.
        batch_size: rows per step.
        eval_batch_size: rows per evaluation step.
        eval_rows: held-out prompts, evenly spread over the test part; None = all.
        optim: the optimiser of the distillation.
        teacher_epochs: epochs of the teacher; None = ``epochs``.
        teacher_optim: its optimiser, and that of oracle and student before the distillation; None =
            ``optim``.
        start_epochs: epochs of the student before the distillation; None = as many as the teacher's.
        writing: whose texts the student is distilled on; None = the oracle's.
        answers: see ``language``.
        answer_tokens: see ``language``.
        oracle: network of the oracle.
        oracle_epochs: epochs of the oracle; None = ``teacher_epochs``, 0 = its weights are taken as they are.
        texts: texts of the oracle that teacher and student begin with.
        prompts: further prompts that the student is distilled on.
        prompt: tokens at the beginning of a row that make a prompt, where the texts have none.
        evaluations: how often proxy and golden are measured, at logarithmic distances.
        kind: the divergence that both are measured by, see ``metrics.hacking.distances``.
        tolerance: nats per text by which golden may rise from its lowest before it is called hacking.

    Source: Tiapkin et al. 2025 (arXiv 2502.02671).
    Differs: networks and texts of a size for a CPU; the teacher is as well trained as the student at first.
    """

    scenario: ClassVar[str] = "teacher_hacking"

    oracle: Student = field(default_factory=lambda: LlamaStudent(layers=4, width=96, heads=6))
    oracle_epochs: int | None = None
    texts: int = 2000
    prompts: int = 64
    prompt: int = 16
    evaluations: int = 10
    kind: Kind = "forward_kl"
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (
            ("oracle_epochs", 0),
            ("texts", 1),
            ("prompts", 1),
            ("prompt", 1),
            ("evaluations", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}: allowed are values of at least {low}")
        if not self.tolerance >= 0:
            raise ConfigError(f"tolerance is {self.tolerance}: allowed are values from 0")

    def check(self, recipe: Any) -> None:
        """Preflight: as ``language``, and a teacher that learns what the oracle writes."""
        super().check(recipe)
        if not getattr(recipe.teacher, "learns", False):
            raise ConfigError(
                f"teacher is {type(recipe.teacher).__name__}, but it must learn the oracle's texts: "
                "take trained, with any network"
            )
        if not self.oracle.reads_text():
            raise ConfigError(
                f"scenario.oracle is {type(self.oracle).__name__}, which is no language model: take llama or "
                "causal_lm"
            )
        if recipe.student.needs_teacher:
            raise ConfigError(
                f"the student is {type(recipe.student).__name__}, made of its teacher's weights, but it must "
                "begin with what the oracle wrote: take llama or causal_lm"
            )
        tokens = Tokens(recipe)
        if getattr(self.oracle, "pretrained", False):
            check_own(tokens.tokenizer, self.oracle.tokenizer(), "oracle")
        if tokens.other is not None or tokens.lessons is not None:
            raise ConfigError("oracle, teacher and student must read the same tokens: leave teacher.data out")
        self.oracle.check(tokens.spec)

    def desk(self, recipe: Any, run: Run) -> Desk:
        """The desk with the oracle at it."""
        return OracleDesk(self, recipe, run)

    def teach(self, pair: Pair, desk: Desk) -> None:
        """The stages ``oracle`` and ``teacher``, and what both write."""
        assert isinstance(desk, OracleDesk) and pair.teacher is not None
        later = self.epochs if self.teacher_epochs is None else self.teacher_epochs
        first = later if self.oracle_epochs is None else self.oracle_epochs
        if first:
            self.learn(desk, "oracle", desk.oracle, desk.human, first, desk.key("oracle"))
        desk.oracle.requires_grad_(False).eval()
        desk.write(desk.oracle, ("texts", "prompts", "golden"))
        pair.teach(True)
        self.learn(desk, "teacher", pair.teacher, desk.taught, later, desk.key("teacher"))
        pair.teach(False)
        desk.write(pair.teacher, ("proxy",))

    def begin(self, pair: Pair, desk: Desk) -> None:
        """The stage ``start``: the student learns the oracle's texts, as its teacher did."""
        epochs = self.start_epochs
        if epochs is None:
            epochs = self.epochs if self.teacher_epochs is None else self.teacher_epochs
        if epochs:
            self.learn(desk, "start", pair.student, desk.taught, epochs, desk.key("start"))

    def train(self, pair: Pair, desk: Desk, selection: Selection) -> dict[str, Any]:
        """The stage ``train``, with proxy and golden measured on its way."""
        assert isinstance(desk, OracleDesk)
        desk.look(0)
        return super().train(pair, desk, selection)

    def watches(self, desk: Desk) -> Any:
        """Measures both distances at the end of some epochs."""
        assert isinstance(desk, OracleDesk)
        return lambda net, epoch: desk.look(epoch + 1)

    def measure(self, pair: Pair, desk: Desk) -> dict[str, Any]:
        """As ``language``, over the oracle's texts of the held-out prompts; and what proxy and golden did."""
        assert isinstance(desk, OracleDesk)
        found = super().measure(pair, desk)
        between = pair.run.once(
            "hacking-teacher", lambda: desk.distance("golden", pair.teacher).mean().item()
        )
        return found | {"hacking": curves(self, desk, between)}

    def protocol(self) -> dict[str, Any]:
        """As ``language``, and the experiment's own constants."""
        own = ("oracle_epochs", "texts", "prompts", "prompt", "evaluations", "kind", "tolerance")
        return (
            super().protocol() | {name: getattr(self, name) for name in own} | {"oracle": asdict(self.oracle)}
        )


class OracleDesk(Desk):
    """The texts of one experiment: the data's, and in their place what the oracle and the teacher write.

    Attributes:
        oracle: the truth.
        human: the data's training texts, in batches.
        parts: prompts that texts are written to, by name: rows [N] of the data's training or test part.
        told: the texts, by the same names.
    """

    plan: TeacherHacking

    def __init__(self, plan: TeacherHacking, recipe: Any, run: Run) -> None:
        super().__init__(plan, recipe, run)
        check_prompts(plan.prompt, self.train_rows)
        wanted, have = plan.texts + plan.prompts, len(self.learning.index)
        if wanted > have:
            raise ConfigError(
                f"texts and prompts are {wanted} together but the data has {have} training rows: lower one"
            )
        self.human, held = self.learning, self.test.index
        self.oracle = plan.oracle.build(self.tokens.spec, run.generator("oracle")).to(run.device)
        self.oracle.train()
        order = self.learning.index[torch.randperm(have, generator=run.generator("prompts"))]
        texts, prompts = order[: plan.texts], order[plan.texts : wanted]
        self.parts = {"texts": texts, "prompts": prompts, "golden": held, "proxy": held}
        self.told = nn.ModuleDict(
            {name: Texts(len(index), self.train_rows.ids.shape[1]) for name, index in self.parts.items()}
        )
        run.modules.add_module("oracle", self.oracle)
        run.modules.add_module("texts", self.told)
        self.taught = self._batches("texts", plan.batch_size)
        self.learning = self._batches("prompts", plan.batch_size)
        self.everything, self.held_out = self.learning, torch.empty(0, dtype=torch.int64)
        self.test = self._batches("golden", plan.eval_batch_size, shuffle=False)
        self.train_rows = self.learning.rows

    def _prompts(self, name: str) -> Any:
        return self.test_rows if name in ("golden", "proxy") else self.human.rows

    def _batches(self, name: str, size: int, *, shuffle: bool = True) -> TokenBatches:
        texts: Any = self.told[name]
        rows = texts.rows(self._prompts(name), self.parts[name])
        return TokenBatches(rows, batch_size=size, seed=derive(self.run.seed, name), shuffle=shuffle)

    def write(self, net: Net, names: Sequence[str]) -> None:
        """Let ``net`` write the texts ``names``; a run that is resumed behind this has them already."""
        if self.run.pending is not None:
            return
        writer = Writer(
            model=model_of(net), length=self.train_rows.ids.shape[1], prompt=self.plan.prompt,
            eos=self.tokens.spec.special.get("eos"), batch_size=256, vocabulary=self.tokens.spec.classes,
        )  # fmt: skip
        for name in names:
            texts: Any = self.told[name]
            texts.clear()
            writer.write(texts, self._prompts(name), self.parts[name], self.run.generator("written", name))

    def key(self, stage: str) -> dict[str, Any]:
        """All that the weights after a stage before the distillation depend on, besides its length."""
        plan, settings = self.plan, self.run.settings
        who = {"oracle": plan.oracle, "teacher": self.recipe.teacher, "start": self.recipe.student}[stage]
        own = {"stage": stage, "network": repr(who), "seed": self.run.seed, "batch": plan.batch_size}
        own |= {"data": self.human.describe(), "precision": settings.precision}
        own |= {"compile": settings.compile, "device": self.run.device.type}
        if stage == "oracle":
            return own
        asked = (plan.oracle_epochs, plan.teacher_epochs, plan.epochs, plan.texts, plan.prompt)
        return own | {
            "oracle": repr(plan.oracle),
            "texts": asked,
            "optims": repr((plan.teacher_optim, plan.optim)),
        }

    def protocol(self) -> dict[str, Any]:
        """As of other texts, but for their length: each seed's oracle ends its texts where it likes."""
        found = super().protocol()
        return {name: found[name] for name in found if name != "test_tokens"}

    def look(self, epoch: int) -> None:
        """Measure both distances before the distillation (0) or behind the number of rounds ``epoch``."""
        if epoch in points(self.plan.epochs, self.plan.evaluations):
            self.run.once(f"hacking-{epoch}", self._look)

    def _look(self) -> dict[str, Any]:
        student = self.pair.student
        was = student.training
        found = {name: self.distance(name, student.eval()) for name in ("proxy", "golden")}
        student.train(was)
        return {
            "proxy": float(found["proxy"].mean()), "golden": float(found["golden"].mean()),
            "golden_interval": list(mean_interval(found["golden"])),
        }  # fmt: skip

    @torch.no_grad()
    def distance(self, name: str, net: Net | None) -> Tensor:
        """How far ``net`` is from the oracle (golden) or the teacher (proxy) over each text of theirs [N]."""
        reference = self.oracle if name == "golden" else self.pair.teacher
        assert net is not None and reference is not None
        found = torch.zeros(len(self.parts[name]), dtype=torch.float64)
        texts = self._batches(name, self.plan.eval_batch_size, shuffle=False)
        for batch in self.run.over(f"distance to the {name} texts", texts):
            moved = batch.to(self.run.device)
            assert moved.rows is not None
            with autocast(self.run):
                own, other = net(moved), reference(moved)
            parts = [
                distances(logits_of(other, part), logits_of(own, part), self.plan.kind).double().cpu()
                for part in torch.split(torch.arange(len(moved.labels), device=self.run.device), CHUNK)
            ]
            of = batch.index[moved.rows.cpu() // batch.inputs.shape[1]]
            found.index_add_(0, of, torch.cat(parts))
        return found


def logits_of(outputs: Outputs, part: Tensor) -> Tensor:
    """Logits [r, V] of some rows of what a language model said."""
    assert outputs.hidden is not None and outputs.unembedding is not None
    return outputs.unembedding.logits(outputs.hidden[part])


def points(epochs: int, count: int) -> list[int]:
    """0 and numbers of rounds up to ``epochs``, some ``count`` of them, at equal ratios."""
    return [0, *sorted({round(float(x)) for x in np.geomspace(1, epochs, count)})]


def curves(plan: TeacherHacking, desk: OracleDesk, teacher: float) -> dict[str, Any]:
    """What proxy and golden did over the distillation, in nats per text."""
    epochs = points(plan.epochs, plan.evaluations)
    seen = [desk.run.once(f"hacking-{epoch}", dict) for epoch in epochs]
    per_epoch = desk.learning.steps if plan.epoch_steps is None else plan.epoch_steps
    steps = [epoch * per_epoch for epoch in epochs]
    proxy, golden = ([each[name] for each in seen] for name in ("proxy", "golden"))
    report = hacking_report(proxy, golden, plan.tolerance)
    law = power_law(steps[1:], proxy[1:]) if len(steps) > 2 and min(proxy) > 0 else None
    return {
        "unit": "nats per text", "steps": steps, "proxy": proxy, "golden": golden,
        "golden_interval": [each["golden_interval"] for each in seen], "golden_of_teacher": teacher,
        "golden_start": golden[0], "golden_lowest": golden[report.argmin], "golden_last": golden[-1],
        "proxy_start": proxy[0], "proxy_there": proxy[report.argmin], "proxy_last": proxy[-1],
        "lowest_step": steps[report.argmin], "rise": report.rise, "hacked": report.hacked,
        "power_law": None if law is None else asdict(law),
    }  # fmt: skip
