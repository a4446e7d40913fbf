"""Where figures are found."""

from __future__ import annotations

from limbeck.report import figures


def test_names_with_dots_are_found() -> None:
    tree = {"terms": {"train": {"kd": 1.0, "kd2.kd": 2.0}}, "student": {"forgetting": {"cdl": 3.0}}}
    assert [figures.lookup(tree, path) for path in ("terms.train.kd", "terms.train.kd2.kd")] == [1.0, 2.0]
    assert figures.lookup(tree, "student.forgetting.cdl") == 3.0
    assert figures.lookup(tree, "student.forgetting.cdl.more") is None
    assert figures.lookup(tree, "terms.train.kd2") is None
