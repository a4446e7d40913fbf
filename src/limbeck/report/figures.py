"""The figures that a run ends with: one name, unit and meaning each, the same on page, block and table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Unit = Literal["%", "points", "nats", "bits", "ms", "count", "share", "times"]

# A list of the protocol is printed up to here; the whole of it stands in result.json.
LONGEST = 20


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of ``result.json``.

    Attributes:
        path: where it stands, dotted, for example ``student.forgetting.cdl``.
        label: what it is called.
        unit: ``%`` and ``points`` count 0..100, ``share`` 0..1, ``nats`` the natural logarithm, ``bits`` that
            to base 2; ``times`` is a factor.
        meaning: one sentence.
        better: whether more or less of it is better; empty where neither is.
    """

    path: str
    label: str
    unit: Unit
    meaning: str
    better: Literal["higher", "lower", ""] = ""

    def of(self, result: Mapping[str, Any]) -> float | None:
        """The value in ``result``; None where the run does not have it."""
        value = lookup(result, self.path)
        return None if value is None else float(value)

    def interval(self, result: Mapping[str, Any]) -> str:
        """The interval that stands beside the value, with its unit, for people; empty where there is none."""
        value = lookup(result, f"{self.path}_interval")
        if value is None:
            return ""
        low, high = (self.text(float(end)) for end in value)
        return f"{low.removesuffix(' %')} to {high}"

    def text(self, value: float | None) -> str:
        """``value`` with its unit, for people."""
        return number(value, self.unit)


def lookup(tree: Mapping[str, Any], path: str) -> Any:
    """What stands at the dotted ``path``, whose names may hold dots themselves; None where nothing does."""
    if path in tree:
        return tree[path]
    parts = path.split(".")
    for cut in range(1, len(parts)):
        inner = tree.get(".".join(parts[:cut]))
        found = lookup(inner, ".".join(parts[cut:])) if isinstance(inner, Mapping) else None
        if found is not None:
            return found
    return None


def number(value: float | None, unit: Unit) -> str:
    """A value with its unit: ``78.4 %``, ``2.1 points``, ``0.034``, ``7.3 bits``, ``1.2 M``; ``-``: None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    match unit:
        case "%":
            return f"{value:z.1f} %"
        case "points":
            return f"{value:z.1f}"
        case "ms":
            return f"{value:.3g} ms"
        case "bits":
            return f"{value:z.1f} bits"
        case "times":
            return f"{value:.2f}" if value < 1000 else f"{value:.3g}"
        case "count":
            return count(value)
        case "nats" | "share":
            return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def count(value: float) -> str:
    """A count in three digits: ``950``, ``12.3 k``, ``1.20 M``, ``4.10 G``."""
    for power, suffix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            scaled = value / 10**power
            digits = max(0, 2 - int(math.log10(abs(scaled))))
            return f"{scaled:.{digits}f} {suffix}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time as people say it: ``0.8 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


ACCURACY = Figure(
    "student.accuracy", "accuracy", "%", "share of the test images that the student gets right", "higher"
)
AVERAGE = Figure(
    "student.average_accuracy",
    "average accuracy",
    "%",
    "mean over all tasks of the accuracy after the last task, among all classes",
    "higher",
)
INCREMENTAL = Figure(
    "student.incremental_average",
    "incremental average",
    "%",
    "mean over the stream of the average accuracy on the tasks seen so far",
    "higher",
)
JUST_LEARNED = Figure(
    "student.just_learned",
    "just learned",
    "%",
    "mean accuracy on a task right after it was learnt: how well the student still learns",
    "higher",
)
AGREEMENT = Figure(
    "fidelity.agreement",
    "agreement",
    "%",
    "share of the test images on which student and teacher say the same class",
    "higher",
)
KL = Figure("fidelity.kl", "KL", "nats", "divergence from the teacher's to the student's classes", "lower")
RANKS = Figure(
    "fidelity.rank_correlation",
    "rank correlation",
    "share",
    "mean over the images of Spearman's correlation of the classes' order, -1 to 1",
    "higher",
)
CKA = Figure(
    "fidelity.cka",
    "CKA",
    "share",
    "linear CKA of what the classifiers of student and teacher read, 0 to 1",
    "higher",
)
ECE = Figure(
    "student.ece", "ECE", "share", "mean distance between confidence and accuracy over the bins", "lower"
)
NLL = Figure("student.nll", "NLL", "nats", "mean negative log likelihood of the true class", "lower")
BRIER = Figure(
    "student.brier", "Brier", "share", "mean squared distance to the one-hot truth, 0 to 2", "lower"
)
SQUARED = Figure(
    "student.squared_error",
    "squared error",
    "share",
    "mean squared distance of the outputs, as they are, to the one-hot truth",
    "lower",
)
COST = (
    Figure("cost.student.parameters", "parameters", "count", "numbers in the network", "lower"),
    Figure("cost.student.trainable", "trainable", "count", "numbers that training may change", "lower"),
    Figure("cost.student.multiply_adds", "multiply-adds", "count", "for one image, forward", "lower"),
    Figure("cost.student.latency_ms", "latency", "ms", "median time of one forward pass", "lower"),
)

PERPLEXITY = Figure(
    "student.perplexity",
    "perplexity",
    "times",
    "exp of the NLL: among how many equally likely tokens the student is as undecided",
    "lower",
)
ACCEPTANCE = Figure(
    "fidelity.acceptance",
    "acceptance",
    "share",
    "sum over all tokens of the smaller probability: how often speculative decoding keeps a draft",
    "higher",
)
EXPOSURE = Figure(
    "exposure.student",
    "exposure",
    "bits",
    "mean over the planted secrets of how far the student prefers them to others of their form",
    "lower",
)
OF_TOKENS = (
    PERPLEXITY,
    replace(ACCURACY, meaning="share of the test tokens that the student finds the most probable"),
    Figure(
        "student.exact_match", "exact match", "%", "share of the prompts answered as they should be", "higher"
    ),
    Figure(
        "student.rouge_l",
        "ROUGE-L",
        "share",
        "longest common run of words with the right answer, F1",
        "higher",
    ),
    replace(
        AGREEMENT, meaning="share of the test tokens where student and teacher find the same most probable"
    ),
    Figure(
        "fidelity.answer_agreement",
        "agreement of answers",
        "%",
        "share of the prompts that student and teacher answer alike, right or wrong",
        "higher",
    ),
    replace(KL, meaning="forward: from the teacher's to the student's next token"),
    Figure(
        "fidelity.reverse_kl",
        "reverse KL",
        "nats",
        "from the student's to the teacher's next token: what the student says and the teacher would not",
        "lower",
    ),
    Figure(
        "fidelity.top_overlap",
        "top-5 overlap",
        "%",
        "share of the teacher's five most probable tokens that are among the student's five",
        "higher",
    ),
    ACCEPTANCE,
    Figure(
        "hacking.golden_last",
        "golden",
        "nats",
        "distance from the oracle at the end, per text",
        "lower",
    ),
    Figure(
        "hacking.proxy_last",
        "proxy",
        "nats",
        "distance from the teacher at the end, per text",
        "lower",
    ),
    replace(ECE, meaning="mean distance, token by token, between confidence and accuracy over the bins"),
    replace(NLL, meaning="mean negative log likelihood of the tokens that the texts have"),
    EXPOSURE,
    *(
        replace(figure, meaning="for a row of tokens, forward, with all logits")
        if figure.path.endswith("multiply_adds")
        else figure
        for figure in COST
    ),
)
"""What is said of a language model, the task's figure first."""


OF_PATHS = (ACCURACY, AGREEMENT, KL, NLL, ECE)
"""What is said of each path of a teacher that has several."""


OF_NESTED = (NLL, KL, COST[0])
"""What is said of each network that was cut out of the student."""


def forgetting(definition: str, meaning: str = "") -> Figure:
    """Forgetting by one of the field's definitions, in points of accuracy."""
    return Figure(
        f"student.forgetting.{definition}", f"forgetting ({definition})", "points", meaning, "lower"
    )


def of_teacher(figure: Figure) -> Figure:
    """The same figure of the teacher; what compares the two (agreement, KL, ranks, CKA) has none."""
    if figure is EXPOSURE:
        return replace(figure, path="exposure.teacher")
    return replace(
        figure, path=figure.path.replace("student.", "teacher.", 1).replace("fidelity.", "teacher.", 1)
    )


def figures_of(result: Mapping[str, Any]) -> tuple[Figure, ...]:
    """The figures that ``result`` holds, the task's first, then fidelity, calibration and cost."""
    if of_text(result):
        first, *others = OF_TOKENS
        named = (first, *domains_of(result), *others)
        return tuple(figure for figure in named if figure.of(result) is not None)
    definitions = lookup(result, "protocol.forgetting_definitions") or {}
    names = lookup(result, "student.forgetting") or {}
    lost = tuple(forgetting(name, str(definitions.get(name, ""))) for name in names)
    alike = (AGREEMENT, KL, RANKS, CKA)
    known = (ACCURACY, AVERAGE, INCREMENTAL, JUST_LEARNED, *lost, *alike, ECE, NLL, BRIER, SQUARED, *COST)
    return tuple(figure for figure in known if figure.of(result) is not None)


def of_text(result: Mapping[str, Any]) -> bool:
    """Whether ``result`` is of a language model."""
    return PERPLEXITY.of(result) is not None


def domains_of(result: Mapping[str, Any]) -> tuple[Figure, ...]:
    """The perplexity on the texts of each domain, where there are several."""
    names = lookup(result, "student.domain_perplexity") or {}
    return tuple(
        Figure(
            f"student.domain_perplexity.{name}",
            f"perplexity, {name}",
            "times",
            f"on texts of {name}",
            "lower",
        )
        for name in names
    )


def paths_of(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A teacher's main answer and its other paths, as text: how right each is, and how near to the student.

    Empty where the teacher has no other path.
    """
    others = result.get("paths") or {}
    if not others:
        return []
    main = {**(result.get("teacher") or {}), **(result.get("fidelity") or {})}
    return [
        {"path": name} | {f.label: f.text(found.get(_last(f))) for f in OF_PATHS}
        for name, found in {"main": main, **others}.items()
    ]


def nested_figures(result: Mapping[str, Any]) -> tuple[Figure, ...]:
    """The figures of each network that was cut out of the student."""
    return tuple(
        replace(f, path=f"nested.{name}.{f.path.replace('student.', '', 1)}", label=f"{name}, {f.label}")
        for name in result.get("nested") or {}
        for f in OF_NESTED
    )


def nested_of(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The networks that were cut out of the student, as text: how large and how good each is.

    Empty where the student holds none.
    """
    return [
        {"network": name, COST[0].label: COST[0].text(found["cost"]["parameters"])}
        | {f.label: f.text(({**found, **(found.get("fidelity") or {})}).get(_last(f))) for f in OF_PATHS}
        for name, found in (result.get("nested") or {}).items()
    ]


def _last(figure: Figure) -> str:
    """The figure's own name, without whose it is."""
    return figure.path.rpartition(".")[2]


def headline_of(result: Mapping[str, Any]) -> Figure:
    """The one figure that the scenario is about."""
    if of_text(result):
        return PERPLEXITY
    return AVERAGE if AVERAGE.of(result) is not None else ACCURACY


def protocol_lines(protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The protocol as pairs of name and text, without the definitions of forgetting."""
    return [
        (name.replace("_", " "), _plain(value))
        for name, value in protocol.items()
        if name != "forgetting_definitions"
    ]


def _plain(value: Any) -> str:
    """A value of the protocol in words rather than in JSON."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        if len(value) > 2 and len({str(part) for part in value}) == 1:
            return f"{len(value)} x {_plain(value[0])}"
        if len(value) > LONGEST:
            return ", ".join(_plain(part) for part in value[:LONGEST]) + f" ... ({len(value)} in all)"
        return ", ".join(_plain(part) for part in value) or "none"
    return str(value)
