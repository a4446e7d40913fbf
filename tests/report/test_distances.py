"""The charts of proxy and golden."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.report.distances import hacking_charts
from limbeck.report.page import environment

FOUND: dict[str, Any] = {
    "unit": "nats per text", "steps": [0, 10, 40], "proxy": [3.0, 2.0, 1.0], "golden": [9.0, 8.0, 8.5],
    "hacked": True, "golden_of_teacher": 7.25,
}  # fmt: skip


def test_both_are_drawn_over_the_steps_and_over_each_other() -> None:
    over, plot = hacking_charts({"hacking": FOUND})
    assert [line.name for line in over.lines] == ["proxy", "golden"]
    assert [mark.text for mark in over.lines[1].marks][-1] == "golden, 40: 8.5 nats per text"
    across = [mark.x for mark in plot.lines[0].marks]
    assert across == sorted(across, reverse=True), "proxy falls, so the plot runs from right to left"
    heights = [mark.y for mark in plot.lines[0].marks]
    assert heights[1] > heights[2] > heights[0], "golden falls, then rises: canvas units grow downwards"


def test_runs_without_an_oracle_have_none() -> None:
    assert hacking_charts({}) == [] == hacking_charts({"hacking": None})


@pytest.mark.parametrize("hacked", [True, False])
def test_the_template_says_whether_it_was_hacked(hacked: bool) -> None:
    source = environment().loader.get_source(environment(), "page.html.j2")[0]  # type: ignore[union-attr]
    start = source.index("{% if hacking %}\n<h2")
    part = source[start : source.index("{% if curves %}\n<h2")]
    result = {"hacking": FOUND | {"hacked": hacked}}
    head = '{% import "charts.html.j2" as draw %}'
    text = environment().from_string(head + part).render(result=result, hacking=hacking_charts(result))
    assert ("Not hacked" in text) is not hacked and "7.25 nats per text" in text and "<svg" in text
