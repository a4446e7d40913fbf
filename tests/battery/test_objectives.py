"""What every objective must keep, whatever it matches: a new file in ``objectives/`` is tested at once.

The outputs are made up: logits of a student with two heads and of a teacher, and token features of different
widths at every tap that the objective names. An objective that reads no logits of a teacher gets what
language models say instead: hidden states of different widths, and last layers over one vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from limbeck import registry
from limbeck.contracts import Batch, Facts, Net, Objective, Outputs, Progress, Unembedding

BATCH, CLASSES, TOKENS, OWN_WIDTH, OTHER_WIDTH = 6, 5, 4, 8, 12
WIDTHS = {"projected": OTHER_WIDTH}  # taps that a student gives in its teacher's width
AT = Progress(step=3, steps=40, epoch=1, epochs=4, task=1, tasks=2)

pytestmark = pytest.mark.parametrize("name", registry.names("objectives"))


def make(name: str) -> Objective:
    found: Objective = registry.get("objectives", name)()
    return found


def batch(objective: Objective, order: Tensor | None = None) -> Batch:
    """Images, or texts of which one token counts."""
    order = torch.arange(BATCH) if order is None else order
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, 3, 4, 4, generator=generator)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    marks = {"privacy": torch.linspace(0, 1, BATCH)[order], "drawn": torch.linspace(-3, -1, BATCH)[order]}
    rows = torch.arange(BATCH) if reads_text(objective) else None
    if rows is not None:
        inputs = labels[:, None]
    return Batch(
        inputs=inputs[order], labels=labels[order], index=order, view=0 * order, rows=rows, marks=marks
    )


def outputs(seed: int, taps: tuple[str, ...], width: int, *, heads: int, grad: bool = False) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(BATCH, CLASSES, generator=generator) for _ in range(heads)]
    sizes = {tap: (BATCH, TOKENS, WIDTHS.get(tap, width)) for tap in taps}
    features = {tap: torch.randn(*size, generator=generator) for tap, size in sizes.items()}
    for leaf in (*logits, *features.values()):
        leaf.requires_grad_(grad)
    return Outputs(*logits, features=features)


class MadeUp(Net):
    """A network without weights whose taps give tokens as ``outputs`` does, for objectives that run one."""

    def __init__(self, taps: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.network = Chain(taps, width)

    def forward(self, batch: Batch, taps: tuple[str, ...] = (), teacher: Outputs | None = None) -> Outputs:
        return Outputs(self.network(batch.inputs))


class Chain(nn.Module):
    """The taps one after another, between pixels and logits."""

    def __init__(self, taps: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.taps, self.width = [tap.replace("-", "last") for tap in taps], width
        self.config = SimpleNamespace(num_attention_heads=2)  # as transformers' models say it
        for tap in self.taps:
            at: nn.Module = self
            *above, last = tap.split(".")
            for part in above:
                at.add_module(part, at._modules.get(part) or nn.Module())
                at = at.get_submodule(part)
            at.add_module(last, nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)[:, : TOKENS * self.width].reshape(-1, TOKENS, self.width)
        for tap in self.taps:
            x = self.get_submodule(tap)(x)
        return x.mean(1)[:, :CLASSES]


def reads_text(objective: Objective) -> bool:
    """Whether it is for language models alone."""
    return objective.needs().teacher_logits and not objective.needs().logits


def spoken(given: Outputs, seed: int, width: int, *, grad: bool) -> Outputs:
    """The same of a language model that holds no logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, width, generator=generator) for rows in (BATCH, CLASSES))
    head = Unembedding(weight.requires_grad_(grad))
    return replace(
        given, logits=torch.empty(BATCH, 0), soft_logits=None, hidden=hidden.requires_grad_(grad),
        unembedding=head,
    )  # fmt: skip


def student(objective: Objective, *, grad: bool = False) -> Outputs:
    taps, name = objective.needs().student, type(objective).__module__.rpartition(".")[2]
    view = outputs(3, taps, OWN_WIDTH, heads=2)  # what it says to the objective's own view of the batch
    own = outputs(1, taps, OWN_WIDTH, heads=2, grad=grad)
    own = spoken(own, 1, OWN_WIDTH, grad=grad) if reads_text(objective) else own
    return replace(own, paths={name: view})


def teacher(objective: Objective, *, grad: bool = False) -> Outputs:
    other = outputs(2, objective.needs().teacher, OTHER_WIDTH, heads=1, grad=grad)
    return spoken(other, 2, OTHER_WIDTH, grad=grad) if reads_text(objective) else other


def leaves(given: Outputs) -> list[Tensor]:
    """What a gradient may reach besides the features."""
    heads = [] if given.unembedding is None else [given.unembedding.weight]
    return [x for x in (given.logits, given.soft_logits, given.hidden, *heads) if x is not None and x.numel()]


def build(objective: Objective, weights: int = 0) -> nn.Module:
    """The module before a stage, with initial ``weights``; one that remembers is built anew for each call."""
    torch.manual_seed(weights)
    needs = objective.needs()
    facts = Facts(
        samples=BATCH, student=MadeUp(needs.student, OWN_WIDTH), teacher=MadeUp(needs.teacher, OTHER_WIDTH)
    )
    module = objective.build(student(objective), teacher(objective), facts)
    if hasattr(module, "start"):
        module.start(torch.arange(BATCH), batch(objective).labels, torch.Generator().manual_seed(0))
    return module


def changed(given: Outputs, change: object, *, weights: bool = True) -> Outputs:
    """``given`` with every tensor put through ``change``, a last layer's weights too, or not."""
    assert callable(change)
    soft, hidden = (None if x is None else change(x) for x in (given.soft_logits, given.hidden))
    head = given.unembedding
    if head is not None and weights:
        head = Unembedding(change(head.weight))
    features = {tap: change(x) for tap, x in given.features.items()}
    paths = {name: changed(other, change, weights=weights) for name, other in given.paths.items()}
    return replace(
        given, logits=change(given.logits), soft_logits=soft, features=features, paths=paths, hidden=hidden,
        unembedding=head,
    )  # fmt: skip


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def test_terms_are_finite_scalars_with_names(name: str) -> None:
    objective = make(name)
    terms = build(objective)(student(objective), teacher(objective), batch(objective), AT)
    assert terms
    for term in terms.values():
        assert term.shape == ()
        assert torch.isfinite(term)


def test_gradient_reaches_the_student_and_never_the_teacher(name: str) -> None:
    objective = make(name)
    module, own, other = build(objective), student(objective, grad=True), teacher(objective, grad=True)
    total(module(own, other, batch(objective), AT)).backward()
    assert all(x.grad is None for x in (*leaves(other), *other.features.values()))
    read = [own.features[tap] for tap in objective.needs().student] or leaves(own)
    learns = [x.grad is not None and bool(x.grad.abs().max() > 0) for x in read]
    assert all(learns) if objective.needs().student else any(learns)
    orphans = [n for n, p in module.named_parameters() if p.grad is None]
    assert not orphans


def test_order_of_the_batch_does_not_matter(name: str) -> None:
    objective = make(name)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    plain = build(objective)(student(objective), teacher(objective), batch(objective), AT)
    given = student(objective), teacher(objective)
    own, other = (changed(x, lambda t: t[order], weights=False) for x in given)
    shuffled = build(objective)(own, other, batch(objective, order), AT)
    for term in plain:
        torch.testing.assert_close(shuffled[term], plain[term])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_float32_terms(name: str, dtype: torch.dtype) -> None:
    objective = make(name)
    own, other = (changed(x, lambda t: t.to(dtype)) for x in (student(objective), teacher(objective)))
    for term in build(objective)(own, other, batch(objective), AT).values():
        assert term.dtype == torch.float32
        assert torch.isfinite(term)


def test_sample_weights_count(name: str) -> None:
    objective = make(name)
    own, other = student(objective), teacher(objective)
    plain = build(objective)(own, other, batch(objective), AT)
    ones = build(objective)(own, other, replace(batch(objective), weight=torch.ones(BATCH)), AT)
    none = build(objective)(own, other, replace(batch(objective), weight=torch.zeros(BATCH)), AT)
    for term in plain:
        torch.testing.assert_close(ones[term], plain[term])
        assert none[term] == 0


def test_value_where_student_equals_teacher_is_as_stated(name: str) -> None:
    objective = make(name)
    stated = type(objective).__dict__["zero_at_teacher"]
    other = teacher(objective)
    features = student(objective).features
    if stated:  # whose widths may differ where they need not be equal
        features = dict(zip(features, other.features.values(), strict=True))
    own = replace(other, features=features, paths=student(objective).paths)
    value = total(build(objective)(own, other, batch(objective), AT))
    assert (abs(value.item()) < 1e-5) == stated


def test_state_goes_through_a_dictionary(name: str) -> None:
    objective = make(name)
    module, copy = build(objective), build(objective, weights=1)
    copy.load_state_dict(module.state_dict(), strict=True)
    plain = module(student(objective), teacher(objective), batch(objective), AT)
    again = copy(student(objective), teacher(objective), batch(objective), AT)
    assert all(torch.equal(plain[term], again[term]) for term in plain)


def test_the_same_seed_builds_the_same(name: str) -> None:
    objective = make(name)
    first, second = build(objective).state_dict(), build(objective).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_fields_are_the_whole_configuration(name: str) -> None:
    objective = make(name)
    assert type(objective)(**dataclasses.asdict(objective)) == objective
    assert hash(objective) == hash(make(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.weight = 2  # type: ignore[attr-defined]


def test_docstring_is_complete(name: str) -> None:
    cls = type(make(name))
    text = inspect.getdoc(cls) or ""
    assert text.splitlines()[0].endswith(".")
    assert "Source:" in text
    own = {f.name for f in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(Objective)}
    missing = [name for name in own if f"{name}:" not in text]
    assert not missing


def test_no_value_is_read_back_in_a_step(name: str) -> None:
    """On the meta device there are no values: a read (``item``, ``if tensor``) would raise."""
    objective = make(name)
    module = build(objective).to("meta")
    own, other = (changed(x, lambda t: t.to("meta")) for x in (student(objective), teacher(objective)))
    for term in module(own, other, batch(objective).to("meta"), AT).values():
        assert term.is_meta
