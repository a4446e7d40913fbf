from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.report import charts, figures, heat

finite = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=600), st.integers(1, 200))
def test_thinned_curve_is_short_and_keeps_its_range(points: list[tuple[float, float]], most: int) -> None:
    means, ranges = charts.thin(points, most)
    if len(points) <= most:
        assert means == points and not ranges
        return
    assert len(means) == len(ranges) == most
    assert min(low for _, low, _ in ranges) == min(y for _, y in points)
    assert max(high for _, _, high in ranges) == max(y for _, y in points)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=50))
def test_everything_drawn_lies_inside_the_frame(values: list[float]) -> None:
    series = charts.Series("loss", "student", (tuple(enumerate(map(float, values))),), marks=True)
    chart = charts.line_chart("loss", [series], x_label="step", y_label="loss", whole_x=True)
    assert chart is not None
    [line] = chart.lines
    assert all(chart.left - 0.1 <= mark.x <= chart.right + 0.1 for mark in line.marks)
    assert all(chart.top - 0.1 <= mark.y <= chart.bottom + 0.1 for mark in line.marks)
    texts = [tick.text for tick in chart.y_ticks]
    assert len(texts) >= 2 and len(set(texts)) == len(texts)


def test_wide_positive_range_is_logarithmic_and_says_so() -> None:
    series = charts.Series("loss", "student", (((0.0, 1e-3), (1.0, 10.0)),))
    chart = charts.line_chart("loss", [series], x_label="step", y_label="loss")
    assert chart is not None and chart.y_label == "loss, logarithmic"
    assert [tick.text for tick in chart.y_ticks] == ["0.001", "0.01", "0.1", "1", "10"]


def test_nothing_to_draw() -> None:
    assert charts.line_chart("loss", [], x_label="", y_label="") is None
    assert charts.bar_chart("gap", [], x_label="", y_label="") is None
    assert charts.reliability_chart("r", [(0.0, 0.0, 0)], "student") is None


def test_bars_grow_from_zero_both_ways() -> None:
    chart = charts.bar_chart("gap", [4.0, -2.0], x_label="task", y_label="points")
    assert chart is not None and chart.zero is not None
    up, down = chart.bars
    assert up.y + up.height == pytest.approx(chart.zero)
    assert down.y == pytest.approx(chart.zero)
    assert up.height == pytest.approx(2 * down.height, abs=0.2)


def test_reliability_leaves_empty_bins_out() -> None:
    chart = charts.reliability_chart("r", [(0.1, 0.2, 0), (0.9, 0.8, 50)], "student")
    assert chart is not None
    [mark] = chart.lines[0].marks
    assert mark.text == "confidence 0.90, accuracy 0.80, 50 images"


def test_confusion_counts_mistakes_and_recall() -> None:
    table = heat.confusion([[8, 2, 0], [0, 10, 0], [0, 0, 0]], ["a", "b", "c"])
    assert table.recall == (80.0, 100.0, None)
    assert [(m.true, m.said, m.count, m.share) for m in table.mistakes] == [("a", "b", 2, 20.0)]
    assert table.hardest[0] == ("a", 80.0)
    assert [[cell.text for cell in row] for row in table.cells] == [
        ["80", "20", ""],
        ["", "100", ""],
        ["", "", ""],
    ]
    assert not table.levels


@pytest.mark.parametrize("classes", [21, 128, 129, 300])
def test_map_keeps_every_count(classes: int) -> None:
    counts = [[1 if i == j else 0 for j in range(classes)] for i in range(classes)]
    table = heat.confusion(counts, [str(c) for c in range(classes)])
    assert not table.cells
    assert table.size == math.ceil(classes / table.merged) <= heat.MOST_MAPPED
    [(level, path)] = table.levels
    assert level == heat.LEVELS and path.count("M") == table.size


@given(st.floats(0, 1))
def test_levels_of_colour(share: float) -> None:
    assert abs(heat.level(share) - share * heat.LEVELS) <= 0.5


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (999, "999"), (1234, "1.23 k"), (312874, "313 k"), (12.1e6, "12.1 M"), (4.1e9, "4.10 G")],
)
def test_counts_in_three_digits(value: float, text: str) -> None:
    assert figures.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.82, "0.8 s"), (42, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


def test_numbers_carry_their_unit() -> None:
    assert figures.number(78.44, "%") == "78.4 %"
    assert figures.number(-0.01, "points") == "0.0"
    assert figures.number(0.0002, "nats") == "2.0e-04"
    assert figures.number(None, "%") == "-"
    assert figures.number(float("nan"), "%") == "nan"
