"""What the docs show works, and what they link to is there."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import shlex
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.battery import networks, test_objectives, test_selectors, test_students, test_teachers
from tests.engine import small

import limbeck
from limbeck import catalogue, config, plain, registry
from limbeck.contracts import Batch, Outputs, Progress
from limbeck.engine.run import Run
from limbeck.metrics import cost

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language; without one, those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for named, text in fenced if named == language]


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@every_page
def test_yaml_is_yaml(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert plain.parse(text, page.name)


@every_page
def test_commands_name_what_exists(page: Path) -> None:
    for name in re.findall(r"limbeck (?:run|show) ([a-z0-9][a-z0-9_/-]*)\b(?!\.)", page.read_text()):
        kind, slash, own = name.rpartition("/")
        if slash:
            assert registry.canonical(kind, own)
        elif name not in ("cosine", *catalogue.SECTIONS):
            assert any(name in registry.names(kind) for kind in registry.kinds()), name


@every_page
def test_commands_with_overrides_make_a_recipe(page: Path) -> None:
    for line in "".join(blocks(page, "")).splitlines():
        if "limbeck run" in line and "--set" in line:
            words = shlex.split(line, comments=True)
            at = words.index("run") + 1
            sets = [after for word, after in itertools.pairwise(words) if word == "--set"]
            assert config.load(words[at], sets)


@every_page
def test_code_that_is_named_is_there(page: Path) -> None:
    text = page.read_text()
    for name, path in re.findall(r"`([A-Za-z_][\w.]*)`(?: with `[^`]*`)?\s*\(`([\w/]+\.py)`\)", text):
        folder = ROOT if path.startswith("benchmarks/") else ROOT / "src" / "limbeck"
        source = (folder / path).read_text()
        assert all(re.search(rf"\b{part}\b", source) for part in name.split(".")), (name, path)


@every_page
def test_python_calls_fit_their_signatures(page: Path) -> None:
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("limbeck."):
                function = getattr(limbeck, ast.unparse(node.func).removeprefix("limbeck."))
                inspect.signature(function).bind(*node.args, **{str(k.arg): k.value for k in node.keywords})


def test_every_recipe_of_the_stream_stands_in_its_page() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    learners = ("-l2p", "-dualprompt", "-apt", "-cifar100", "-imagenet-r")
    for name in registry.names("recipes"):
        if name != "continual" and not name.endswith(learners) and not name.startswith("pretrain-"):
            assert f"`{name}`" in text, name


@contextmanager
def example(page: str) -> Iterator[Any]:
    """The module that a page shows in full, its only block that defines a class."""
    (code,) = (text for text in blocks(ROOT / "docs" / page, "python") if "\nclass " in text)
    module: Any = types.ModuleType("example")
    sys.modules["example"] = module
    try:
        exec(compile(code, "example", "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules["example"]


def keeps(battery: types.ModuleType, **values: Any) -> None:
    """Run the tests of a battery that ask for nothing but some of ``values``."""
    ran = 0
    for title, test in vars(battery).items():
        if title.startswith("test_") and set(asked := inspect.signature(test).parameters) <= set(values):
            test(**{key: values[key] for key in asked})
            ran += 1
    assert ran > 3


def test_the_example_of_a_method_works() -> None:
    with example("adding-a-method.md") as module:
        logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        batch = Batch(logits, torch.zeros(3).long(), torch.arange(3), torch.zeros(3).long())
        terms = module.Cosine(weight=2.0).terms(Outputs(logits), Outputs(3 * logits), batch, Progress())
        opposite = module.Cosine().terms(Outputs(logits), Outputs(-logits), batch, Progress())
    assert terms["cosine"].item() == pytest.approx(0, abs=1e-6)
    assert opposite["cosine"].item() == pytest.approx(2)


def test_the_example_of_an_objective_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    with example("choices/objectives.md") as module:
        monkeypatch.setattr(registry, "get", lambda *_: module.Similarity)
        keeps(test_objectives, name="similarity")


def test_the_example_of_a_selector_keeps_the_contract() -> None:
    with example("choices/selectors.md") as module:
        keeps(test_selectors, choice=module.Unsure())


def test_the_example_of_a_student_keeps_the_contract() -> None:
    with example("choices/students.md") as module:
        choice = module.MLP(size=networks.SPEC.size)
        asked = {test: networks.build(choice) for test in ("moves", "stays")}
        keeps(test_students, choice=choice, net=asked["moves"])
        net = asked["stays"].eval()
        assert net(networks.batch(), taps=("1",)).features["1"].shape == (5, choice.hidden)


def test_the_example_of_a_teacher_keeps_the_contract(tmp_path: Path) -> None:
    with example("choices/teachers.md") as module:
        choice = module.Committee(models=(networks.classifier(tmp_path),) * 2)
        net = networks.build(choice).eval()
        one = networks.build(registry.get("teachers", "timm")(model=choice.models[0])).eval()
        torch.testing.assert_close(net(networks.batch()).logits, one(networks.batch()).logits)
        assert choice.input_spec().size == networks.IMAGES.size
        test_teachers.test_asking_changes_nothing(net)
        test_teachers.test_what_does_not_learn_stays_in_evaluation_mode(net)
        test_teachers.test_bf16(net)


def test_the_example_of_a_prompt_learner_works() -> None:
    with example("choices/prompts.md") as module:
        built = module.Shared(length=6, blocks=(0, 2)).build(5, 4, 3, 2, networks.seeded())
        keys, values = built(torch.zeros(7, 0)).prefix[2]
        assert keys.shape == values.shape == (7, 3, 4)
        assert [name for name, _ in built.named_parameters()] == ["rows"]


def test_the_example_of_a_scenario_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "latency", lambda _: 0.0)
    images = "{channels: 1, size: 8, mean: [0.5], std: [0.5]}"
    teacher = f"teacher={{name: module, target: 'tests.battery.test_scenarios:trained', images: {images}}}"
    one = ("student.prompts.pool=1", "student.kd_prompts=null", teacher)
    recipe = small.recipe(tmp_path, *one, f"engine.cache_root={tmp_path / 'caches'}")
    with example("choices/scenarios.md") as module:
        scenario = module.ThenLabels(epochs=1, label_epochs=2, batch_size=32)
        with Run(tmp_path / "run", recipe.engine, 0, quiet=True) as run:
            scenario.check(recipe)
            found = scenario.run(recipe, run)
            assert run.done == ["train", "labels"]
    assert 0 <= found["student"]["accuracy"] <= 100
