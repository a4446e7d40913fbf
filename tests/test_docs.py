"""What the docs show works, and what they link to is there."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from limbeck import plain, registry
from limbeck.contracts import Batch, Outputs, Progress

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_yaml_is_yaml(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert plain.parse(text, page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_name_recipes_that_exist(page: Path) -> None:
    for name in re.findall(r"limbeck (?:run|show) ([a-z0-9][a-z0-9-]*)\b(?!\.)", page.read_text()):
        if name not in ("cosine",):
            assert any(name in registry.names(kind) for kind in registry.kinds()), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
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


def test_the_example_of_a_method_works() -> None:
    (code,) = blocks(ROOT / "docs" / "adding-a-method.md", "python")
    module: Any = types.ModuleType("example")
    sys.modules["example"] = module
    try:
        exec(compile(code, "example", "exec"), module.__dict__)
        logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        batch = Batch(logits, torch.zeros(3).long(), torch.arange(3), torch.zeros(3).long())
        terms = module.Cosine(weight=2.0).terms(Outputs(logits), Outputs(3 * logits), batch, Progress())
        opposite = module.Cosine().terms(Outputs(logits), Outputs(-logits), batch, Progress())
    finally:
        del sys.modules["example"]
    assert terms["cosine"].item() == pytest.approx(0, abs=1e-6)
    assert opposite["cosine"].item() == pytest.approx(2)
