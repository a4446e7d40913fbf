"""Imports run downward only, and what must start fast imports little."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import limbeck

ROOT = Path(limbeck.__file__).parent
GROUND = {"bounded", "errors", "contracts", "registry", "plain", "config", "terminal"}
FLOORS = {
    **dict.fromkeys(("losses", "metrics", "nets"), 0),
    **dict.fromkeys(("data", "engine"), 1),
    **dict.fromkeys(("teachers", "students", "objectives", "selectors"), 2),
    **dict.fromkeys(("scenarios", "recipes", "report"), 3),
}
TOP = 4  # every other module that stands beside the wings: api, cli and what they are made of
MODULES = sorted(ROOT.rglob("*.py"))


def part(module: Path) -> str:
    """The wing or top-level module that a file belongs to."""
    return module.relative_to(ROOT).with_suffix("").parts[0]


def floor(name: str) -> int:
    """The floor of a wing or a top-level module; a new wing must say its own."""
    return TOP if (ROOT / f"{name}.py").is_file() else FLOORS[name]


def imported(module: Path) -> Iterator[str]:
    """The parts of limbeck that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "limbeck" else [base]
        yield from (name.split(".")[1] for name in names if name.startswith("limbeck."))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_imports_run_downward(module: Path) -> None:
    own = part(module)
    if own in GROUND:
        assert set(imported(module)) <= GROUND
        return
    for other in imported(module):
        assert other in GROUND or floor(other) <= floor(own), f"{own} must not import {other}"


REFUSED = {
    "torch.load", "torch.save", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "eval",
    "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.full_load",
    "yaml.unsafe_load", "np.loadtxt", "np.fromregex",
}  # fmt: skip
"""Calls that run what a file says, or may."""
IMPORTERS = {"config.py", "registry.py", "__init__.py", "nets/torchvision_ops.py", "nets/modules.py"}
"""Who imports by name: the house's own modules, torchvision, and code that the user trusts."""
TRUSTED = ast.dump(ast.Constant(False))


def wrong_calls(tree: ast.AST, name: str) -> list[str]:
    """The calls in a module that could run code of a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            given_by = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names = {name.split(".")[0] for name in given_by}
            found += sorted(names & {"subprocess", "runpy", "code", "marshal"})
        if isinstance(node, ast.ClassDef):
            found += [b for b in map(ast.unparse, node.bases) if b in ("yaml.Loader", "yaml.UnsafeLoader")]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.dump(keyword.value) for keyword in node.keywords}
        if called in REFUSED:
            found.append(called)
        if called.endswith("import_module") and name not in IMPORTERS:
            found.append(called)
        if called.endswith(".from_pretrained") and given.get("trust_remote_code") != TRUSTED:
            found.append(f"{called} without trust_remote_code=False")
        if called.endswith("np.load") and given.get("allow_pickle") != TRUSTED:
            found.append(f"{called} without allow_pickle=False")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_no_file_runs_code(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    assert wrong_calls(tree, module.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(x)", "eval(x)", "yaml.load(x)", "import subprocess", "np.load(x)",
        "importlib.import_module(x)", "np.load(x, allow_pickle=True)", "T.from_pretrained(x)",
        "T.from_pretrained(x, trust_remote_code=True)",
        "class Own(yaml.Loader): pass",
    ],
)  # fmt: skip
def test_such_a_call_is_seen(text: str) -> None:
    assert len(wrong_calls(ast.parse(text), "data/own.py")) == 1


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_nothing_is_pickled(module: Path) -> None:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            given_by = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names = {name.split(".")[0] for name in given_by}
            assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in REFUSED, f"line {node.lineno}: {called}"


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) == "losses"], ids=lambda m: m.stem)
def test_losses_hold_no_modules_and_no_randomness(module: Path) -> None:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            assert not any("Module" in ast.unparse(base) for base in node.bases)
        if isinstance(node, ast.Call):
            assert not ast.unparse(node.func).startswith(("torch.rand", "random."))
