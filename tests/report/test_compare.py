from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from tests.report.sample_run import write_continual, write_static

from limbeck.errors import ConfigError, DataError
from limbeck.report.compare import Comparison, Spread, compare

AVERAGE = "student.average_accuracy"


def runs(folder: Path, recipe: str, seeds: range = range(3), **options: object) -> list[Path]:
    made = [
        write_continual(
            folder / f"{recipe}-{len(list(folder.iterdir()))}", recipe=recipe, seed=seed, steps=2, **options
        )
        for seed in seeds
    ]
    for seed, path in zip(seeds, made, strict=True):
        edit(path, protocol__class_order=[seed, *range(9)])
    return made


def edit(folder: Path, **fields: object) -> None:
    result = json.loads((folder / "result.json").read_text())
    for path, value in fields.items():
        *parents, last = path.split("__")
        here = result
        for name in parents:
            here = here[name]
        here[last] = value
    (folder / "result.json").write_text(json.dumps(result))


def values(folders: list[Path], *path: str) -> list[float]:
    found = []
    for folder in folders:
        here = json.loads((folder / "result.json").read_text())
        for name in path:
            here = here[name]
        found.append(here)
    return found


def shown(comparison: Comparison, **options: object) -> str:
    out = io.StringIO()
    Console(file=out, width=80, **options).print(comparison)  # type: ignore[arg-type]
    return out.getvalue()


def test_mean_spread_and_interval_are_those_of_scipy(tmp_path: Path) -> None:
    folders = runs(tmp_path, "cdl-kd", range(5))
    [method] = compare(folders).methods
    spread, raw = method.spreads[AVERAGE], values(folders, "student", "average_accuracy")
    assert method.label == "cdl-kd" and spread.n == 5
    assert spread.mean == pytest.approx(np.mean(raw), rel=1e-12)
    assert spread.sd == pytest.approx(np.std(raw, ddof=1), rel=1e-12)
    assert spread.interval == pytest.approx(stats.ttest_1samp(raw, 0).confidence_interval(0.95), rel=1e-9)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    kd, kdp = runs(tmp_path, "cdl-kd", range(4)), runs(tmp_path, "cdl-kdp", range(1, 5))
    found = compare([*reversed(kdp), *kd], baseline="cdl-kd")
    first, second = found.methods
    assert (first.label, second.label) == ("cdl-kdp", "cdl-kd")
    difference = first.differences[AVERAGE]
    a = values(kdp[:3], "student", "average_accuracy")
    b = values(kd[1:], "student", "average_accuracy")
    assert sorted(difference.values) == [1, 2, 3]
    assert difference.mean == pytest.approx(np.subtract(a, b).mean(), rel=1e-12)
    assert difference.interval == pytest.approx(stats.ttest_rel(a, b).confidence_interval(0.95), rel=1e-9)
    assert not second.differences
    assert any("the seeds differ" in note for note in found.notes)


def test_all_figures_of_the_stream_are_compared(tmp_path: Path) -> None:
    found = compare(runs(tmp_path, "cdl-kd"))
    paths = [figure.path for figure in found.figures]
    for path in ("average_accuracy", "incremental_average", "just_learned", "ece"):
        assert f"student.{path}" in paths
    assert [p for p in paths if "forgetting" in p] == [
        f"student.forgetting.{d}" for d in ("cdl", "coda", "l2p")
    ]
    assert {"fidelity.agreement", "fidelity.kl", "cost.student.parameters"} <= set(paths)


def test_static_runs(tmp_path: Path) -> None:
    folders = [write_static(tmp_path / str(seed), seed=seed) for seed in range(3)]
    found = compare(folders)
    assert found.figures[0].path == "student.accuracy"
    assert found.methods[0].spreads["student.accuracy"].n == 3
    assert "accuracy, %" in shown(found)


def test_same_recipe_with_another_constant_is_another_method(tmp_path: Path) -> None:
    folders = runs(tmp_path, "cdl-kd") + runs(tmp_path, "cdl-kd", temperature=4.0)
    found = compare(folders, baseline="cdl-kd (objective.1.temperature=2.0)")
    assert [method.label for method in found.methods] == [
        "cdl-kd (objective.1.temperature=2.0)",
        "cdl-kd (objective.1.temperature=4.0)",
    ]
    with pytest.raises(ConfigError, match="unknown baseline 'cdl-kd'"):
        compare(folders, baseline="cdl-kd")


def test_machine_settings_make_no_other_method(tmp_path: Path) -> None:
    folders = runs(tmp_path, "cdl-kd", range(2))
    for number, folder in enumerate(folders):
        with (folder / "recipe.yaml").open("a") as recipe:
            recipe.write(f"engine: {{threads: {number + 1}, precision: float32}}\n")
    assert len(compare(folders).methods) == 1
    with (folders[0] / "recipe.yaml").open("a") as recipe:
        recipe.write("selector: {name: random}\n")
    assert len(compare(folders).methods) == 2


def test_student_alone_has_no_fidelity_but_is_compared(tmp_path: Path) -> None:
    folders = runs(tmp_path, "cdl-none", teacher=False) + runs(tmp_path, "cdl-kd")
    alone, kd = compare(folders, baseline="cdl-none").methods
    assert "fidelity.kl" not in alone.spreads and "fidelity.kl" in kd.spreads
    assert AVERAGE in kd.differences and "fidelity.kl" not in kd.differences


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": "fashion_mnist"}, "data is digits in cdl-kd and fashion_mnist in cdl-kdp"),
        ({"protocol__tasks": 10}, "tasks is 5 in cdl-kd and 10 in cdl-kdp"),
        ({"protocol__sizes": [1, 9]}, "sizes is"),
        ({"protocol__class_order": [9]}, "class order at seed 0"),
    ],
)
def test_other_questions_are_refused_or_said(tmp_path: Path, change: dict[str, object], said: str) -> None:
    folders = runs(tmp_path, "cdl-kd") + runs(tmp_path, "cdl-kdp")
    for folder in folders[3:]:
        edit(folder, **change)
    with pytest.raises(ConfigError, match=said) as refused:
        compare(folders)
    assert "\n" not in str(refused.value)
    found = compare(folders, mixed=True)
    assert f"NOT THE SAME QUESTION: {said}" in found.notes[0]
    assert "NOT THE SAME QUESTION" in shown(found)


def test_another_training_protocol_is_noted(tmp_path: Path) -> None:
    folders = runs(tmp_path, "cdl-kd") + runs(tmp_path, "cdl-kdp")
    for folder in folders[3:]:
        edit(folder, protocol__epochs=20)
    found = compare(folders)
    assert found.notes == ("protocol: epochs is 40 in cdl-kd, 20 in cdl-kdp",)
    assert "epochs" not in found.protocol and found.protocol["tasks"] == 5


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    found = compare(runs(tmp_path, "cdl-kd", range(1)))
    spread = found.methods[0].spreads[AVERAGE]
    assert spread.sd is None and spread.interval is None
    assert "(one seed)" in shown(found)
    assert Spread({0: 1.0}).as_dict() == {
        "mean": 1.0,
        "sd": None,
        "n": 1,
        "interval": None,
        "values": {"0": 1.0},
    }


def test_wrong_calls(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare([])
    folders = runs(tmp_path, "cdl-kd") + runs(tmp_path, "cdl-kdp")
    with pytest.raises(ConfigError, match=r"unknown baseline 'cdl-kdd'.*did you mean 'cdl-kd'"):
        compare(folders, baseline="cdl-kdd")
    with pytest.raises(ConfigError, match="seed 0 of cdl-kd occurs twice"):
        compare([folders[0], folders[0]])
    with pytest.raises(DataError, match="has not finished"):
        compare([write_continual(tmp_path / "part", finished=False, steps=2)])


def test_table_fits_eighty_columns_and_names_the_protocol(tmp_path: Path) -> None:
    text = shown(compare(runs(tmp_path, "cdl-kd") + runs(tmp_path, "cdl-kdp"), baseline="cdl-kd"))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "minus cdl-kd, seed by seed" in text
    assert "forgetting (l2p)" in text and "train: current task; test: none" in text


def test_json_holds_every_value(tmp_path: Path) -> None:
    folders = runs(tmp_path, "cdl-kd")
    data = json.loads(json.dumps(compare(folders).data, allow_nan=False))
    method = data["methods"]["cdl-kd"]
    assert list(method["figures"][AVERAGE]["values"].values()) == values(
        folders, "student", "average_accuracy"
    )
    assert method["runs"] == {str(seed): str(folder) for seed, folder in enumerate(folders)}


@pytest.mark.parametrize(("kind", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot(tmp_path: Path, kind: str, begins: bytes) -> None:
    found = compare(
        runs(tmp_path, "cdl-kd") + runs(tmp_path, "cdl-none", range(1), teacher=False), baseline="cdl-kd"
    )
    path = found.plot(tmp_path / f"plot.{kind}")
    assert path.read_bytes().startswith(begins)
    if kind == "svg":
        assert "cdl-none" in path.read_text() and path.read_bytes() == found.plot(path).read_bytes()


def test_plot_of_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"suffix '\.gif': allowed are \.png"):
        compare(runs(tmp_path, "cdl-kd")).plot(tmp_path / "plot.gif")
