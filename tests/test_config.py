from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck import config, plain
from limbeck.contracts import Objective, Selector
from limbeck.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 4

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width is {self.width}: allowed are values of at least 1")


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float
    mode: Literal["fast", "careful"] = "fast"
    order: Literal["natural"] | tuple[int, ...] = "natural"
    limit: int | None = None
    inner: Inner = Inner()
    maybe: Inner | None = None
    several: tuple[Inner, ...] = ()
    selector: Selector | None = None
    objectives: tuple[Objective, ...] = ()
    prompts: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: Path | None = None


def made(**given_fields: Any) -> Outer:
    return config.make(Outer, {"rate": 1, **given_fields}, "outer")


# Values


def test_plain_values_become_typed_fields() -> None:
    outer = made(
        order=[2, 0, 1],
        inner={"width": 2},
        maybe={"width": 3},
        several=[{"width": 1}, {}],
        selector={"name": "random", "fraction": 0.25},
        objectives=["kd", {"name": "labels", "weight": 0.5}],
        options={"a": [1, 2]},
        where="some/file",
    )
    assert isinstance(outer.rate, float)
    assert outer.order == (2, 0, 1)
    assert (outer.inner, outer.maybe, outer.several) == (
        Inner(width=2),
        Inner(width=3),
        (Inner(width=1), Inner()),
    )
    assert type(outer.selector).__name__ == "Random"
    assert [type(o).__name__ for o in outer.objectives] == ["KD", "Labels"]
    assert outer.where == Path("some/file")
    assert outer.options == {"a": [1, 2]}


def test_null_is_allowed_only_where_the_field_says_so() -> None:
    assert made(limit=None, selector=None, maybe=None).limit is None
    with pytest.raises(ConfigError, match=r"outer\.inner is None but"):
        made(inner=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": "fast"}, r"^outer\.rate is 'fast' but must be a valid number$"),
        ({"rate": True}, r"^outer\.rate is True but must be a valid number$"),
        ({"limit": 2.5}, r"^outer\.limit is 2\.5 but must be a valid integer"),
        ({"limit": "3"}, r"^outer\.limit is '3' but must be a valid integer$"),
        ({"mode": "carefull"}, r"^outer\.mode is 'carefull' but must be 'fast' or 'careful': .*'careful'\?$"),
        ({"order": [0, "x"]}, r"^outer\.order is \[0, 'x'\] but must be 'natural' or .*integer.* at \[1\]"),
        ({"inner": {"width": 0}}, r"^outer\.inner: width is 0: allowed are values of at least 1$"),
        ({"inner": {"widht": 2}}, r"^unknown field 'widht' at outer\.inner: did you mean 'width'\?"),
        ({"several": [{}, {"width": -1}]}, r"^outer\.several\.1: width is -1"),
        ({"selector": {"name": "randm"}}, r"^unknown selector 'randm' at outer\.selector: .*'random'"),
        ({"selector": {"fraction": 1}}, r"^outer\.selector says no name: add one of .*\ball\b"),
        ({"selector": {"name": "random", "fraction": 2}}, r"^outer\.selector: fraction is 2\.0 but must lie"),
        ({"objectives": [{"name": "kd", "temp": 1}]}, r"^unknown field 'temp' at outer\.objectives\.0: "),
        ({"prompts": "cida"}, r"^unknown prompt learner 'cida' at outer\.prompts: did you mean 'coda'\?"),
        ({"moed": "fast"}, r"^unknown field 'moed' at outer: did you mean 'mode'\?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        made(**fields)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^outer\.rate is missing"):
        config.make(Outer, {}, "outer")


# YAML


def test_scalars_are_those_of_yaml_1_2() -> None:
    read = plain.parse("a: 1e-3\nb: no\nc: [1, -2.5, .inf, true, null, ~]\nd:\ne: 2024-01-01\nf: 1:30", "x")
    assert read["a"] == 1e-3
    assert read["c"] == [1, -2.5, math.inf, True, None, None]
    assert (read["b"], read["d"], read["e"], read["f"]) == ("no", None, "2024-01-01", "1:30")


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: [1", "a: !!python/object/apply:os.getcwd []", "a: b: c"])
def test_bad_yaml_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^file line \d+ is no valid YAML: ") as caught:
        plain.parse(text, "file")
    assert "\n" not in str(caught.value)


words = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=6)
words |= st.sampled_from(
    ["1e3", "no", "on", "~", "true", "010", "1_000", "0x1F", "2024-01-01", "1:30", ".inf"]
)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | words
trees = st.recursive(scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(words, t, max_size=3))


@given(st.dictionaries(words, trees, max_size=4))
def test_what_is_written_reads_back_equal(tree: dict[str, Any]) -> None:
    assert plain.parse(plain.write(tree), "x") == tree


# Inheritance


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_maps_merge_lists_replace_and_the_name_is_the_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        parent="description: old\nbaselines: [x]\npredicted: [y]\n"
        "scenario: {name: continual, tasks: 5, optim: {lr: 1e-2, name: adam}}\n"
        "objective: [labels, kd]\n",
        child="base: parent.yaml\nscenario: {tasks: 2, optim: {name: sgd}}\nobjective: [dkd]\n",
    )
    assert plain.read(tmp_path / "child.yaml") == {
        "name": "child",
        "scenario": {"name": "continual", "tasks": 2, "optim": {"lr": 1e-2, "name": "sgd"}},
        "objective": ["dkd"],
    }


def test_a_changed_name_replaces_a_choice() -> None:
    under = {"student": {"name": "prompted_vit", "prompts": {"name": "coda", "pool": 10}}}
    assert plain.merge(under, {"student": {"prompts": "l2p"}})["student"]["prompts"] == {"name": "l2p"}
    assert plain.merge(under, {"student": {"prompts": "CODA"}})["student"]["prompts"]["pool"] == 10
    assert plain.merge(under, {"student": {"name": "prompted-vit"}})["student"]["prompts"]["pool"] == 10
    assert plain.merge(under, {"student": {"name": "timm"}})["student"] == {"name": "timm"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: b.yaml", "b": "base: a.yaml"}, r"a\.yaml is based on itself"),
        ({"a": "base: a.yaml"}, r"a\.yaml is based on itself"),
        ({"a": "base: [x, y]"}, r"base of a\.yaml is \['x', 'y'\]: allowed is one"),
        ({"a": "base: gone.yaml"}, r"there is no file .*gone\.yaml: give"),
        ({"a": "base: cdl-kdq"}, r"unknown recipe 'cdl-kdq': did you mean 'cdl-kd'\?"),
        ({"a": "- x"}, r"must be a map of field names"),
        ({"a": ""}, r"must be a map of field names"),
    ],
)
def test_a_bad_base_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plain.read(write(tmp_path, **files) / "a.yaml")


# Overrides

STACK: dict[str, Any] = {
    "student": {"name": "prompted_vit", "prompts": {"name": "coda", "pool": 3}},
    "objective": [{"name": "labels"}, {"name": "kd", "temperature": 2}],
    "data": "digits",
}


@pytest.mark.parametrize(
    ("item", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("student.prompts.pool=7", ("student", "prompts", "pool"), 7),
        ("student.prompts=l2p", ("student", "prompts"), {"name": "l2p"}),
        ("student.prompts.name=l2p", ("student", "prompts"), {"name": "l2p"}),
        ("objective.1.temperature=1e1", ("objective", 1), {"name": "kd", "temperature": 10.0}),
        ("objective.kd.temperature=4", ("objective", 1), {"name": "kd", "temperature": 4}),
        ("objective=[labels]", ("objective",), ["labels"]),
        ("data.root=a=b", ("data",), {"name": "digits", "root": "a=b"}),
        ("scenario.optim.lr=0.1", ("scenario",), {"optim": {"lr": 0.1}}),
    ],
)
def test_overrides(item: str, path: tuple[Any, ...], value: Any) -> None:
    found: Any = plain.override(STACK, item)
    for key in path:
        found = found[key]
    assert found == value
    assert STACK["student"]["prompts"] == {"name": "coda", "pool": 3}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("seed", r"must be written path\.to\.field=value"),
        ("=3", r"must be written path\.to\.field=value"),
        ("a..b=3", r"must be written path\.to\.field=value"),
        ("objective.2.weight=1", r"'2' is no entry of the list: choose 0 to 1 or one of labels, kd"),
        ("objective.dkd.weight=1", r"'dkd' is no entry of the list"),
        ("seed=[1", r"--set seed line 1 is no valid YAML"),
    ],
)
def test_bad_overrides_are_refused(item: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plain.override(STACK, item)


# Whole recipes


def test_overrides_and_seed_reach_the_recipe() -> None:
    recipe = config.load("cdl-kd", ["objective.kd.temperature=3", "scenario.epochs=2"], seed=7)
    assert recipe.objective[1].temperature == 3  # type: ignore[attr-defined]
    assert recipe.scenario.epochs == 2  # type: ignore[attr-defined]
    assert (recipe.seed, recipe.name) == (7, "cdl-kd")


def test_fingerprints_tell_apart_what_is_asked_for_and_nothing_else() -> None:
    one = config.load("cdl-kd")
    assert config.fingerprint(one) == config.fingerprint(dataclasses.replace(one, name="x", description="y"))
    assert config.fingerprint(one) != config.fingerprint(config.load("cdl-kd", ["seed=1"]))
    assert config.fingerprint(one) != config.fingerprint(config.load("cdl-kd", ["objective.kd.weight=0.4"]))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["studnet.x=1"], r"unknown field 'studnet': did you mean 'student'\?"),
        (["objective=[]"], r"objective is an empty list"),
        (["scenario.epochs=0"], r"scenario: epochs is 0: allowed"),
        (["scenario.optim.lr=-1"], r"scenario\.optim: lr is -1\.0: allowed"),
        (["engine.precision=fp32"], r"engine\.precision is 'fp32' but must be .*did you mean 'float32'\?"),
        (["data=digit"], r"unknown data set 'digit' at data: did you mean 'digits'\?"),
        (["teacher=prompted"], r"unknown teacher 'prompted' at teacher: did you mean 'prompted_vit'\?"),
        (["seed=x"], r"seed is 'x' but must be a valid integer"),
        (["views=3"], r"views is 3 but must be a map"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load("cdl-kd", sets)


def test_a_recipe_without_a_student_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a="data: digits\n")
    with pytest.raises(ConfigError, match=r"lacks 'student': add it, choose from .*prompted_vit"):
        config.load(tmp_path / "a.yaml")


def test_what_yaml_cannot_hold_is_named() -> None:
    recipe = dataclasses.replace(config.load("cdl-kd"), data=object())
    with pytest.raises(ConfigError, match="data is a object, which a recipe cannot hold"):
        config.dump(recipe)


BOMBS = {
    "aliases": ("a: &a [x, x]\nb: [*a, *a]", "alias \\*a: write the value out"),
    "a circle": ("a: &a [*a]", "alias"),
    "depth": ("a: " + "[" * 10_000, "more than 50 lists and maps within one another"),
    "Python": (
        "a: !!python/object/apply:os.system ['x']",
        "tag tag:yaml.org,2002:python/object/apply:os.system",
    ),
    "a tag": ("a: !!int abc", "tag tag:yaml.org,2002:int"),
    "a number": (f"a: {'9' * 10_000}", "9{20} has more than 64 bits"),
    "half a letter": ('a: "\\ud800"', "half of a pair"),
    "a key that is no word": ("{1: 2}", "key 1 is no word"),
    "no key": ("~: 2", "key None is no word"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_what_a_stranger_may_write_is_refused_in_one_line(case: str) -> None:
    text, message = BOMBS[case]
    with pytest.raises(
        ConfigError, match=f"x line 1 is no valid YAML: {message}" if case != "aliases" else message
    ):
        plain.parse(text, "x")


def test_numbers_are_finite_and_seeds_have_63_bits() -> None:
    for item, said in (
        ("scenario.optim.lr=.inf", "finite"), ("objective.kd.temperature=.nan", "finite"),
        (f"seed={2**63}", "more than 64 bits"), ("data.data=3", "must be a map of field names"),
        ("data.data=null", "must be a map of field names"), ("data.seed=-1", "seed is -1: allowed"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            config.load("kd-cnn", [item])
    with pytest.raises(ConfigError, match=r"from 0 to 2\*\*63 - 1"):
        config.load("kd-cnn", seed=2**63)


def test_many_keys_take_little_time() -> None:
    assert len(plain.parse("\n".join(f"k{place}: 1" for place in range(20_000)), "x")) == 20_000
