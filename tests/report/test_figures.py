"""Where figures are found."""

from __future__ import annotations

from limbeck.report import figures


def test_names_with_dots_are_found() -> None:
    tree = {"terms": {"train": {"kd": 1.0, "kd2.kd": 2.0}}, "student": {"forgetting": {"cdl": 3.0}}}
    assert [figures.lookup(tree, path) for path in ("terms.train.kd", "terms.train.kd2.kd")] == [1.0, 2.0]
    assert figures.lookup(tree, "student.forgetting.cdl") == 3.0
    assert figures.lookup(tree, "student.forgetting.cdl.more") is None
    assert figures.lookup(tree, "terms.train.kd2") is None


def test_networks_within_a_student_have_figures_of_their_own() -> None:
    one = {"nll": 1.5, "accuracy": 60.0, "ece": 0.01, "fidelity": {"kl": 0.1, "agreement": 80.0},
           "cost": {"parameters": 1200}}  # fmt: skip
    result = {"student": {}, "nested": {"budget-50": one, "space0.smallest": {**one, "fidelity": None}}}
    found = {figure.path: figure.of(result) for figure in figures.nested_figures(result)}
    assert found == {
        "nested.budget-50.nll": 1.5,
        "nested.budget-50.fidelity.kl": 0.1,
        "nested.budget-50.cost.parameters": 1200,
        "nested.space0.smallest.nll": 1.5,
        "nested.space0.smallest.fidelity.kl": None,
        "nested.space0.smallest.cost.parameters": 1200,
    }
    first, other = figures.nested_of(result)
    assert (first["network"], first["parameters"], first["NLL"], first["KL"]) == (
        "budget-50", "1.20 k", "1.500", "0.100"
    )  # fmt: skip
    assert other["KL"] == other["agreement"] == "-"
    assert figures.nested_figures({"student": {}}) == () and figures.nested_of({"student": {}}) == []


def test_an_interval_has_the_unit_of_its_figure() -> None:
    result = {"student": {"accuracy_interval": [53.44, 56.1]}, "fidelity": {"kl_interval": [0.398, 0.4204]}}
    assert figures.ACCURACY.interval(result) == "53.4 to 56.1 %"
    assert figures.KL.interval(result) == "0.398 to 0.420"
    assert figures.AGREEMENT.interval(result) == ""
