"""Runs of elastic students: what is true before, during and after the training, and of what is cut out."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import small, small_texts
from tests.engine.killing import killed_and_resumed
from torch import Tensor

from limbeck import api, config
from limbeck.contracts import Batch, Progress
from limbeck.data.tokens import Rows, batch_of
from limbeck.engine.optim import Optim, trainable_groups
from limbeck.errors import ConfigError, LimbeckError
from limbeck.metrics import cost
from limbeck.nets.causal_lm import CausalLM
from limbeck.nets.elastic import Sizes, masked
from limbeck.nets.language_models import load_model
from limbeck.nets.slices import taken
from limbeck.nets.taps import Frozen
from limbeck.students.elastic import ElasticNet, ElasticStudent

SHAPE = {"layers": 4, "width": 16, "heads": 4, "kv_heads": 2, "mlp": 32}
ALL = (1.0,)
AXES = {"hidden": (0.5, 1.0), "ffn": (0.5, 1.0), "heads": (0.5, 1.0), "layers": (0.5, 0.75, 1.0)}
WHOLE = dict.fromkeys(AXES, ALL)
HALF = Sizes(hidden=8, ffn=16, heads=2, layers=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "write_page", lambda _: None)
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def teacher(place: Path) -> str:
    return small_texts.model(place, "parent", **SHAPE)


def frozen(place: Path) -> Frozen:
    return Frozen(CausalLM(load_model(teacher(place))))


def attached(place: Path, seed: int = 0, **fields: Any) -> ElasticNet:
    """An elastic student of the small teacher, not yet prepared."""
    plan = ElasticStudent(**{**AXES, **fields})
    net = plan.build(small_texts.Spec(classes=16), torch.Generator().manual_seed(seed))
    net.attach_teacher(frozen(place))
    assert isinstance(net, ElasticNet)
    return net


def texts(count: int = 6, length: int = 9) -> Batch:
    ids = torch.randint(16, (count, length + 1), generator=torch.Generator().manual_seed(2))
    rows = Rows("", ids[:, :-1], ids[:, 1:].clone(), None, torch.zeros(count), ("all",))
    return batch_of(rows, torch.arange(count))


def recipe(place: Path, *sets: str) -> config.Recipe:
    student = "student={name: elastic, hidden: [0.5, 1.0], ffn: [0.5, 1.0], calibration: 8, router_rate: 1}"
    given = (f"teacher.model={teacher(place)}", student, "student.heads=[0.5, 1.0]", "objective=[divergence]")
    return small_texts.recipe(place, *given, *sets)


@functools.cache
def finished(place: Path, *sets: str) -> Path:
    folder = place / f"run-{len(list(place.iterdir()))}"
    api.run(recipe(place, *sets), out=folder, quiet=True)
    return folder


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


# Before the training


def test_all_of_the_teacher_is_the_teacher(place: Path) -> None:
    net, batch = attached(place, budgets=ALL, **WHOLE).train(), texts()
    said = frozen(place)(batch).logits
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(batch).logits, said, rtol=0, atol=1e-5)


def test_distilling_all_of_the_teacher_starts_at_0(place: Path) -> None:
    whole = [f"student.{axis}=[1.0]" for axis in AXES]
    folder = finished(place, "student.budgets=[1.0]", *whole, "scenario.optim.lr=1e-9", "scenario.epochs=1")
    steps = [line for line in small.lines(folder) if line["event"] == "step"]
    assert steps and all(abs(line["terms"]["divergence"]) < 1e-6 for line in steps)
    found = figures(folder)
    assert found["fidelity"]["agreement"] > 99.9
    assert found["nested"]["budget-100"]["share"] == 1


@pytest.mark.parametrize("order", ["importance", "random"])
def test_order_changes_nothing_of_the_whole_and_is_kept_with_the_run(place: Path, order: str) -> None:
    fixed = "student.sizes=[{hidden: 16, ffn: 32, heads: 4, layers: 4}]"
    folder = finished(
        place, f"student.order={order}", "student.budgets=[1.0]", fixed, "scenario.optim.lr=1e-9"
    )
    kept = json.loads((folder / "checkpoints" / "facts.json").read_text())["elastic"]
    assert sorted(kept["layer_ranks"]) == [0, 1, 2, 3]
    assert [len(kept["hidden"]), len(kept["ffn"][0]), len(kept["heads"][0])] == [16, 32, 4]
    moved = small.weights(folder)["model.embed_tokens.weight"]
    before = load_model(teacher(place)).get_parameter("model.embed_tokens.weight")
    assert not torch.allclose(moved, before, atol=1e-3)
    torch.testing.assert_close(moved.sort(1).values, before.sort(1).values, rtol=0, atol=1e-4)
    assert figures(folder)["fidelity"]["agreement"] > 99.9


def test_importance_is_that_of_the_teacher_as_it_was_trained(place: Path, tmp_path: Path) -> None:
    """A teacher that learns in the run has other weights when the student takes them over."""
    trained = "teacher={name: trained, network: {name: llama, layers: 2, width: 8, heads: 2, mlp: 16}}"
    fixed = "student.sizes=[{hidden: 8, ffn: 16, heads: 2, layers: 2}]"
    sets = (trained, "data.tokenizer=characters", fixed, "student.budgets=[1.0]", "scenario.optim.lr=1e-9")
    found = figures(finished(place, *sets, "scenario.teacher_optim={lr: 0.02}"))
    assert found["fidelity"]["agreement"] > 99.9
    assert found["teacher"]["nll"] < 2.5


# In a step


def test_budgets_are_drawn_as_often_as_the_plan_says(place: Path) -> None:
    net = attached(place, draws=(0.5, 0.3, 0.2), late=0.25)
    for step, wanted in ((0, [1 / 3] * 3), (74, [1 / 3] * 3), (75, [0.5, 0.3, 0.2]), (99, [0.5, 0.3, 0.2])):
        net.start_step(Progress(step=step, steps=100))
        assert net.chances().tolist() == pytest.approx(wanted)


def test_draws_are_a_function_of_seed_and_step(place: Path) -> None:
    one, again, other = attached(place).train(), attached(place).train(), attached(place, seed=1).train()
    other.load_state_dict(one.state_dict())
    said = {}
    for name, net, step in (("one", one, 3), ("again", again, 3), ("later", one, 4), ("other", other, 3)):
        torch.manual_seed(len(said))
        net.start_step(Progress(step=step, steps=10))
        said[name] = net(texts()).logits
    assert torch.equal(said["one"], said["again"])
    assert not torch.equal(said["one"], said["later"])
    assert not torch.equal(said["one"], said["other"])


def test_each_text_is_read_by_the_network_of_its_budget(place: Path) -> None:
    sizes = (Sizes(16, 32, 4, 4), HALF)
    net, batch = attached(place, budgets=(1.0, 0.5), sizes=sizes).train(), texts(20)
    said = net(batch).logits.view(20, 9, -1)
    alone = [net.elastic(batch.inputs, each).logits for each in sizes]
    drawn = [
        min((0, 1), key=lambda b: float((alone[b][row] - said[row]).detach().abs().max()))
        for row in range(20)
    ]
    for row, budget in enumerate(drawn):
        torch.testing.assert_close(said[row], alone[budget][row], rtol=0, atol=1e-4)
    assert 4 < sum(drawn) < 16


@pytest.mark.parametrize("given", [True, False], ids=["sizes", "router"])
def test_gradients_of_a_small_budget_stay_in_its_slice(place: Path, given: bool) -> None:
    half = {"hidden": (0.5,), "ffn": (0.5,), "heads": (0.5,), "layers": (0.5,)}
    chosen = {"sizes": (HALF,), "budgets": (0.5,)} if given else {**half, "budgets": (0.15,)}
    net = attached(place, **chosen).train()
    outputs = net(texts())
    outputs.logits.square().mean().backward()
    network, cut = net.parent.network, net.elastic.cut(HALF)
    inside = 0
    for parameter in network.parameters():
        assert parameter.grad is not None
        inside += int((parameter.grad != 0).sum())
    assert 0 < inside <= net.elastic.parameters_of(HALF)
    first: Tensor = network.get_parameter("model.layers.0.mlp.up_proj.weight").grad
    kept = taken(first, ("ffn", "hidden"), cut, network)
    assert kept.abs().max() > 0
    assert first.abs().sum() == pytest.approx(float(kept.abs().sum()))


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_the_router_learns_by_both_terms(place: Path, mode: str) -> None:
    net = attached(place, mode=mode, router_width=8).train()
    outputs = net(texts())
    assert net.router is not None
    parameters = list(net.router.parameters())
    for term in (outputs.logits.square().mean(), outputs.losses["router"]):
        grads = torch.autograd.grad(term, parameters, retain_graph=True)
        assert all(torch.isfinite(g).all() for g in grads)
        assert any(g.abs().max() > 0 for g in grads)


def test_the_router_has_a_learning_rate_of_its_own(place: Path) -> None:
    net = attached(place, router_rate=50)
    optimizer = Optim(lr=0.01, schedule="constant").build(trainable_groups(torch.nn.ModuleDict({"s": net})))
    Optim(lr=0.01, schedule="constant").set_rate(optimizer, Progress())
    assert net.router is not None
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {rates[id(p)] for p in net.router.parameters()} == {0.5}
    assert {rates[id(p)] for p in net.parent.parameters()} == {0.01}


def test_the_chosen_networks_meet_their_budgets(place: Path) -> None:
    """After a distillation against the teacher with the router's loss beside it."""
    fine = tuple(count / 8 for count in range(3, 9))
    budgets = (1.0, 0.75, 0.5)
    net = attached(
        place, budgets=budgets, hidden=fine, ffn=fine, heads=(0.5, 1.0), layers=(0.5, 0.75, 1.0),
        router_weight=10.0, router_width=32,
    ).train()  # fmt: skip
    batch, steps = texts(12), 160
    wanted = frozen(place)(batch).logits.log_softmax(1)
    optimizer = Optim(name="adam", lr=3e-3).build(
        [*net.parameter_groups(), {"params": list(net.parent.parameters())}]
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 if group["lr_scale"] > 1 else 3e-3
    for step in range(steps):
        net.start_step(Progress(step=step, steps=steps))
        outputs = net(batch)
        kl = (wanted.exp() * (wanted - outputs.logits.log_softmax(1))).sum(1).mean()
        optimizer.zero_grad()
        (kl + outputs.losses["router"]).backward()
        optimizer.step()
    for name, budget in zip(net.plan.names(), budgets, strict=True):
        found = net.eval().nested()[name].about
        assert found["share"] == pytest.approx(budget, abs=0.08), (name, found)


# After the training


def test_every_network_is_a_folder_of_its_own(place: Path) -> None:
    folder, batch = finished(place), texts()
    found = figures(folder)["nested"]
    assert list(found) == ["budget-100", "budget-75", "budget-50"]
    transformers = pytest.importorskip("transformers")
    whole = 0
    for number, (name, about) in enumerate(found.items()):
        where = folder / "student" / (name if number else "")
        network = transformers.AutoModelForCausalLM.from_pretrained(where)
        whole = whole or sum(p.numel() for p in load_model(teacher(place)).parameters())
        own = sum(p.numel() for p in network.parameters())
        assert about["cost"]["parameters"] == own == round(about["share"] * whole)
        assert network.config.num_hidden_layers == len(about["kept_layers"]) == about["sizes"]["layers"]
        assert network.config.hidden_size == about["sizes"]["hidden"]
        assert transformers.AutoTokenizer.from_pretrained(where).vocab_size == 16
        assert torch.isfinite(network(batch.inputs).logits).all()
        assert 1 < about["perplexity"] < 100 and about["fidelity"]["kl"] > 0
    assert found["budget-100"]["nll"] == pytest.approx(figures(folder)["student"]["nll"])
    own = api.load_student(folder)
    assert sum(p.numel() for p in own.parameters()) == found["budget-100"]["cost"]["parameters"]


def test_a_stored_network_says_what_the_masked_parent_says(place: Path, tmp_path: Path) -> None:
    net, batch = attached(place, budgets=(1.0, 0.5), sizes=(Sizes(16, 32, 4, 4), HALF)).eval(), texts()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert net.save(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    with torch.no_grad(), masked(net.parent.network, net.elastic.masks(HALF)):
        said = net.parent.network(batch.inputs).logits
    stored = load_model(str(tmp_path / "budget-50"))(batch.inputs).logits
    torch.testing.assert_close(stored, said, rtol=0, atol=1e-5)


def test_what_is_kept_is_one_parent_and_a_router(place: Path) -> None:
    net = attached(place, router_width=8)
    assert net.router is not None
    parts = {name.split(".")[0] for name in net.state_dict()}
    assert parts == {"parent", "router"}
    own = sum(p.numel() for p in net.parameters())
    assert own == net.elastic.parameters_of(net.elastic.full) + sum(
        p.numel() for p in net.router.parameters()
    )


@pytest.mark.parametrize("at", [1, 6, 13])
def test_killed_and_resumed(place: Path, tmp_path: Path, at: int) -> None:
    asked = recipe(place, "engine.checkpoint_seconds=0")
    again = killed_and_resumed(asked, tmp_path / "run", at=at)
    small.assert_same(again, finished(place))
    for name in ("budget-75", "budget-50"):
        own, other = (f / "student" / name / "model.safetensors" for f in (again, finished(place)))
        assert own.read_bytes() == other.read_bytes()


def test_killed_and_resumed_with_a_teacher_that_learns(place: Path, tmp_path: Path) -> None:
    """The student's weights come from the checkpoint, not from the teacher as it was built."""
    trained = (
        "teacher={name: trained, network: {name: llama, layers: 2, width: 8, heads: 4, kv_heads: 2, mlp: 16}}"
    )
    sets = (trained, "data.tokenizer=characters", "scenario.epochs=1")
    asked = recipe(place, *sets, "engine.checkpoint_seconds=0")
    small.assert_same(killed_and_resumed(asked, tmp_path / "run", at=16), finished(place, *sets))


@pytest.mark.parametrize(
    "sets",
    [("objective=[{name: taid}]", "selector={name: adaspec, fraction: 0.5}"), ("engine.cache_top_k=4",),
     ("objective=[{name: labels}, divergence]", "scenario.writing={share: 0.5, prompt: 4}"),
     ("data.pack=false", "engine.precision=bf16")],
    ids=["taid, adaspec", "top tokens", "labels and GKD", "bf16"],
)  # fmt: skip
def test_it_learns_by_any_objective_and_selector(place: Path, sets: tuple[str, ...]) -> None:
    found = figures(finished(place, "scenario.epochs=1", *sets))
    assert all(1 < each["perplexity"] < 100 for each in found["nested"].values())


def test_what_is_used_is_the_network_of_the_first_budget(place: Path) -> None:
    net, batch = attached(place, budgets=(0.5,), sizes=(HALF,)).eval(), texts()
    used = net.deployed()
    torch.testing.assert_close(used(batch).logits, net(batch).logits)
    assert cost.parameters(used) == net.elastic.parameters_of(HALF)


def test_answers_and_cost_are_those_of_what_is_saved(place: Path) -> None:
    half = "student.sizes=[{hidden: 8, ffn: 16, heads: 2, layers: 2}]"
    found = figures(finished(place, "student.budgets=[0.5]", half, "scenario.epochs=1"))
    for figure in ("parameters", "multiply_adds"):
        assert found["cost"]["student"][figure] == found["nested"]["budget-50"]["cost"][figure]
        assert found["cost"]["student"][figure] < found["cost"]["teacher"][figure]


# Bad input


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no budget": ({"budgets": ()}, r"budgets is \[\]: give at least one share above 0, at most 1"),
    "a budget above all": ({"budgets": (1.2,)}, r"budgets is \[1\.2\]: give at least one share above 0"),
    "rising budgets": ({"budgets": (0.5, 1.0)}, r"budgets is \[0\.5, 1\.0\] but must fall by 0\.01 or more"),
    "shares of nothing": ({"ffn": (0.0,)}, r"ffn is \[0\.0\]: give at least one share above 0"),
    "sizes of too few": ({"sizes": (HALF,)}, "sizes has 1 entries but budgets 3: give each budget one"),
    "draws of too few": ({"draws": (1.0, 2.0)}, "draws has 2 entries but budgets 3"),
    "draws of nothing": ({"draws": (0.0, 0.0, 0.0)}, r"weights is \[0\.0, 0\.0, 0\.0\] but must be"),
    "a late part": ({"late": 1.5}, r"late is 1\.5: allowed are shares from 0 to 1"),
    "an order": ({"order": "importanse"}, "unknown order 'importanse': did you mean 'importance'"),
    "a mode": ({"mode": "mean"}, "unknown mode 'mean'"),
    "calibration": ({"calibration": 0}, "calibration is 0: allowed are values of at least 1"),
    "a weight": ({"router_weight": -1.0}, r"router_weight is -1\.0: allowed are values of at least 0"),
    "a temperature": ({"temperature": (1.0, 0.0)}, r"temperature is \(1\.0, 0\.0\): allowed are"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_fields_out_of_range(case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        ElasticStudent(**fields)


def test_networks_that_are_not_to_be_had(place: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"budgets has 0\.1 but the networks that the router can choose have 0\.\d+ to 1\.000",
    ):
        attached(place, budgets=(1.0, 0.1))
    with pytest.raises(ConfigError, match=r"budgets has 1\.0 but the networks that the router can choose"):
        attached(place, layers=(0.5,))
    with pytest.raises(ConfigError, match="heads is 3 but must be a multiple of the 2 key heads"):
        attached(place, budgets=ALL, sizes=(Sizes(16, 32, 3, 4),))
    with pytest.raises(ConfigError, match="layers is 5 but must be from 1 to 4"):
        attached(place, budgets=ALL, sizes=(Sizes(16, 32, 4, 5),))
    with pytest.raises(
        ConfigError, match=r"sizes\.1 has 1\.000 of the teacher's parameters but its budget is 0\.5"
    ):
        attached(place, budgets=(1.0, 0.5), sizes=(Sizes(16, 32, 4, 4),) * 2)


def test_teachers_that_it_cannot_be_made_of(place: Path, tmp_path: Path) -> None:
    none = recipe(place, "teacher=none", "objective=[labels]", "data.tokenizer=characters")
    with pytest.raises(
        ConfigError, match="is ElasticStudent, which is made of its teacher's weights, but teacher is none"
    ):
        none.scenario.check(none)
    other = recipe(place, "data.tokenizer=bpe:300", "objective=[uld]", "data.shares=[0.2]")
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer has \d+ tokens, but the student is made of its teacher's weights"
    ):
        other.scenario.check(other)
    import transformers

    gpt = transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(gpt).save_pretrained(tmp_path / "gpt")
    small_texts.tokenizer().save_pretrained(tmp_path / "gpt")
    with pytest.raises(LimbeckError, match="belongs to no Llama-like or BERT-like network"):
        api.run(recipe(place, f"teacher.model={tmp_path / 'gpt'}"), out=tmp_path / "run", quiet=True)
