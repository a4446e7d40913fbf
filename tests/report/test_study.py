"""What must be true of a study of many students."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from limbeck.errors import ConfigError, DataError
from limbeck.report.study import BASELINE, BEST, Finding, Study, study

GAINS = {"kd": {100: 3.0, 200: 2.0, 400: 0.5}, "rkl": {100: 2.5, 200: 2.5, 400: -0.5}}


def run(
    folder: Path, name: str, size: int, seed: int, accuracy: float, *, agreement: float | None = 60.0
) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"name: {name}\nseed: {seed}\n")
    result = {
        "recipe": name, "seed": seed, "data": "texts", "student": {"accuracy": accuracy},
        "teacher": None if agreement is None else {"accuracy": 70.0},
        "fidelity": None if agreement is None else {"agreement": agreement, "kl": 1 / agreement},
        "cost": {"student": {"parameters": size}},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    found = []
    for size in (100, 200, 400):
        for seed in (0, 1):
            alone = 40 + size / 100 + seed
            found.append(run(tmp_path / f"lm-{size}-{seed}", "lm", size, seed, alone, agreement=None))
            for name, gains in GAINS.items():
                accuracy = alone + gains[size] + 0.1 * seed
                found.append(
                    run(
                        tmp_path / f"{name}-{size}-{seed}",
                        name,
                        size,
                        seed,
                        accuracy,
                        agreement=50 + gains[size],
                    )
                )
    return found


def asked(found: Study, question: str, of: str = "") -> Finding:
    (test,) = [t for t in found.tests if question in t.question and t.of == of]
    return test


def test_gains_are_over_the_same_student_alone(folders: list[Path]) -> None:
    found = study(folders, baseline="lm")
    assert {method: len(rows) for method, rows in found.gains.items()} == {"kd": 6, "rkl": 6}
    for method, rows in found.gains.items():
        for row in rows:
            assert row["gain"] == pytest.approx(GAINS[method][int(row["size"])] + 0.1 * row["seed"])
            assert row[BASELINE] == 40 + int(row["size"]) / 100 + row["seed"]


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_the_tests_are_scipys(folders: list[Path]) -> None:
    found = study(folders, baseline="lm")
    kd, rkl = ([row["gain"] for row in found.gains[name]] for name in ("kd", "rkl"))
    assert asked(found, "above 0", "kd").outcome == pytest.approx(
        stats.ttest_1samp(kd, 0, alternative="greater")[:2]
    )
    best = np.maximum(kd, rkl)
    assert asked(found, "above 0", BEST).outcome.statistic == pytest.approx(
        stats.ttest_1samp(best, 0).statistic
    )
    assert asked(found, "differ").outcome.p == pytest.approx(stats.f_oneway(kd, rkl).pvalue)
    sizes = [float(row["size of the student"]) for rows in found.gains.values() for row in rows]
    assert asked(found, "size of the student").outcome == pytest.approx(
        tuple(stats.spearmanr(kd + rkl, sizes))
    )
    assert asked(found, "agreement").outcome.statistic > 0.9
    assert np.isnan(asked(found, "with: teacher?").outcome.p), "one teacher alone tells nothing"
    assert not any("BLEU" in test.question for test in found.tests)
    assert all(t.adjusted >= t.outcome.p for t in found.tests if not np.isnan(t.outcome.p))


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_students_without_a_counterpart_are_dropped_loudly(folders: list[Path]) -> None:
    rest = [folder for folder in folders if folder.name != "lm-400-1"]
    with pytest.warns(UserWarning, match="without a counterpart are dropped: 400/texts/seed 1"):
        assert len(study(rest, baseline="lm").gains["kd"]) == 5


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_it_prints_itself_and_is_plain_data(folders: list[Path]) -> None:
    found = study(folders, baseline="lm")
    console = Console(record=True, width=160)
    console.print(found)
    text = console.export_text()
    assert "gain in student.accuracy over lm" in text and "do the methods differ?" in text
    assert json.loads(json.dumps(found.data))["gains"]["kd"][0]["gain"] > 0


@pytest.mark.filterwarnings("ignore")
def test_the_teachers_figure_is_the_one_that_is_gained(folders: list[Path]) -> None:
    for folder in folders:
        place = folder / "result.json"
        result = json.loads(place.read_text())
        result["student"]["rouge_l"] = 0.5
        if result["teacher"]:
            result["teacher"]["rouge_l"] = 0.75
        place.write_text(json.dumps(result))
    for figure, wanted in (("student.rouge_l", 0.75), ("student.accuracy", 70.0)):
        found = study(folders, baseline="lm", figure=figure)
        assert {row["teacher"] for row in found.gains["kd"]} == {wanted}


def test_two_runs_of_one_student_and_method_are_refused(folders: list[Path], tmp_path: Path) -> None:
    again = run(tmp_path / "again", "kd", 100, 0, 50.0)
    with pytest.raises(DataError, match=r"kd-100-0 and .*again are both kd, of one size and seed"):
        study([*folders, again], baseline="lm")


def test_what_cannot_be_compared_is_refused(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match="lm"):
        study(folders, baseline="ml")
    with pytest.raises(ConfigError, match="all runs are of lm"):
        study([f for f in folders if f.name.startswith("lm")], baseline="lm")
    with pytest.raises(ConfigError, match=r"figure is student\.none"):
        study(folders, baseline="lm", figure="student.none")
