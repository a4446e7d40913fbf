"""Every recipe of the package: it validates, survives a round trip, and says what its family says."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from limbeck import config, plain, registry
from limbeck.contracts import Spec

NAMES = registry.names("recipes")
LEARNERS = {"l2p": "l2p-plus", "dualprompt": "dualprompt", "apt": "apt"}
METHODS = ("kd", "dkd", "fitnets", "reviewkd", "kd-token", "kdp", "dcdl", "prompt")


@functools.cache
def load(name: str) -> Any:
    return config.load(name)


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of maps by its dotted path."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {p: v for key, value in tree.items() for p, v in flat(value, f"{path}.{key}".strip(".")).items()}


def changed(name: str, base: str) -> set[str]:
    """The paths in which two recipes ask for different things."""
    one, other = (flat(config.to_plain(load(n))) for n in (name, base))
    paths = {p for p in {**one, **other} if one.get(p, "absent") != other.get(p, "absent")}
    return {p for p in paths if p not in plain.WORDS}


@pytest.mark.parametrize("name", NAMES)
def test_it_validates_and_survives_a_round_trip(name: str) -> None:
    recipe = load(name)
    again = config.build(plain.parse(config.dump(recipe), name))
    assert again == recipe
    assert config.fingerprint(again) == config.fingerprint(recipe)
    assert recipe.name == name


@pytest.mark.parametrize("name", NAMES)
def test_it_says_in_one_line_what_it_is(name: str) -> None:
    assert 10 < len(registry.describe("recipes", name)) <= 110
    assert registry.describe("recipes", name) == load(name).description


@pytest.mark.parametrize("name", NAMES)
def test_baselines_are_recipes_of_the_same_question(name: str) -> None:
    recipe = load(name)
    for baseline in map(load, recipe.baselines):
        assert baseline.data == recipe.data
        assert type(baseline.scenario) is type(recipe.scenario)
        assert getattr(baseline.scenario, "tasks", 1) == getattr(recipe.scenario, "tasks", 1)
        assert config.fingerprint(baseline) != config.fingerprint(recipe)
    for claim in recipe.predicted:
        figure, above, other = claim.split(" ")
        assert above in (">", "<")
        figures = (
            "student", "teacher", "fidelity", "paths", "terms", "selection", "exposure", "nested", "search",
            "hacking",
        )  # fmt: skip
        assert figure.split(".")[0] in figures
        assert other in recipe.baselines or other.split(".")[0] in figures


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_learners_variant_differs_from_its_method_in_the_prompts_alone(method: str, learner: str) -> None:
    name = f"cdl-{method}-{learner}"
    if (method, learner) == ("prompt", "apt"):
        assert name not in NAMES, "APT has no prefix prompts that could be mapped"
        return
    alone = load(LEARNERS[learner])
    assert load(name).student.prompts == load(name).teacher.prompts == alone.student.prompts
    parts = {p.split(".")[0] + "." + p.split(".")[1] for p in changed(name, f"cdl-{method}")}
    assert parts <= {"student.prompts", "teacher.prompts", "student.prompt_map"}


def test_methods_differ_from_logit_kd_in_what_they_are() -> None:
    assert {p.split(".")[1] for p in changed("cdl-kdp", "cdl-kd")} == {"kd_prompts"}
    assert {p.split(".")[1] for p in changed("cdl-kd-token", "cdl-kd")} == {"kd_prompts"}
    assert changed("cdl-dcdl", "cdl-kdp") == {"student.kd_prompts.strict"}
    assert changed("cdl-dkd", "cdl-kd") == changed("cdl-fitnets", "cdl-kd") == {"objective"}
    assert changed("cdl-none", "coda-prompt") == set()


# Those without labels beside logit KD: no paper set their weights in a stream.
OTHERS = ("cdl-none", "cdl-pld", "cdl-dist")


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("cdl-") and n not in OTHERS])
def test_label_and_distillation_weights_are_the_papers(name: str) -> None:
    """L = (1 - alpha) CE + alpha KD with alpha = 0.5, T = 2; predictions mix both heads alike."""
    recipe = load(name)
    labels, soft, *_ = recipe.objective
    assert (labels.weight, soft.weight, recipe.student.share) == (0.5, 0.5, 0.5)
    assert soft.temperature == (4 if type(soft).__name__ == "DKD" else 2)
    assert recipe.scenario.optim.weight_decay == 0
    assert recipe.scenario.schedule == ("joint" if "cdl-prompt" in name else "teacher_then_student")


def test_the_papers_setting() -> None:
    recipe = load("cdl-kdp-vit-b-s-cifar100")
    assert (recipe.scenario.tasks, recipe.scenario.epochs, recipe.scenario.batch_size) == (10, 20, 64)
    assert (recipe.scenario.optim.lr, recipe.scenario.optim.schedule) == (1e-3, "coda")
    assert (recipe.student.kd_prompts.layers, recipe.student.kd_prompts.length) == (12, 6)
    assert changed("cdl-kdp-vit-b-s-imagenet-r", "cdl-kdp-vit-b-s-cifar100") >= {"scenario.epochs"}


def unread(choice: Any) -> Any:
    """The same network with random weights in the place of those to be read."""
    if any(f.name == "pretrained" for f in dataclasses.fields(choice)):
        return dataclasses.replace(choice, pretrained=False)
    return dataclasses.replace(choice, teacher=unread(choice.teacher))


@pytest.mark.parametrize("name", [n for n in NAMES if load(n).data.__class__.__name__ == "Digits"])
def test_small_recipes_fit_their_networks(name: str) -> None:
    """Blocks, pools and widths agree with the shipped networks, without their weights."""
    recipe = load(name)
    form = recipe.student.input_spec()
    spec = Spec(classes=10, tasks=recipe.scenario.tasks, channels=form.channels, size=form.size)
    student = unread(recipe.student).build(spec, torch.Generator())
    if type(recipe.teacher).__name__ == "NoTeacher":
        return
    spec = dataclasses.replace(spec, query_dim=student.query_dim)
    teacher = unread(recipe.teacher).build(spec, torch.Generator())
    student.attach_teacher(teacher)
    recipe.scenario.check(recipe)
