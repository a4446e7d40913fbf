"""From logits to figures, and from figures to ``result.json``, with the protocol beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limbeck.contracts import Batch, Net
from limbeck.data.images import Splits
from limbeck.data.stream import Stream
from limbeck.engine.run import Run
from limbeck.errors import NonFiniteError
from limbeck.metrics import accuracy, calibration, fidelity
from limbeck.metrics import continual as stream_metrics
from limbeck.metrics import cost as costs
from limbeck.nets.taps import classifier_inputs

Figures = dict[str, Any]


def measure(
    logits: Mapping[str, Tensor], labels: Tensor, stream: Stream, task: int, *, full: bool
) -> Figures:
    """What one test pass over the tasks seen tells.

    Args:
        logits: predictions [N, classes seen] by network: ``student`` and, where there is one, ``teacher``;
            those of a teacher's other path as ``teacher/<path>``.
        labels: class ids [N] in the stream's numbering.
        stream: gives the tasks' class ranges.
        task: number of the task just learnt.
        full: also calibration, confusion and the intervals: after the last task.

    Raises:
        NonFiniteError: a prediction is NaN or infinite.
    """
    found: Figures = {}
    owner = torch.bucketize(labels, torch.tensor(stream.edges[1:-1]), right=True)
    for who, values in logits.items():
        if not torch.isfinite(values).all():
            raise NonFiniteError(
                f"the {who}'s predictions after task {task} are not finite: lower its optim.lr"
            )
        right = values.argmax(1) == labels
        hits = [int(right[owner == t].sum()) for t in range(task + 1)]
        totals = [int((owner == t).sum()) for t in range(task + 1)]
        found[who] = {"accuracy": [100 * h / n for h, n in zip(hits, totals, strict=True)]}
        if full:
            found[who] |= last_figures(values, labels)
            found[who]["average_accuracy_interval"] = list(accuracy.average_interval(hits, totals))
    if "teacher" in logits:
        found["fidelity"] = likeness(logits["student"], logits["teacher"], labels)
    for who in logits:
        if "/" in who:
            found[who] |= likeness(logits["student"], logits[who], labels)
    return found


def last_figures(logits: Tensor, labels: Tensor) -> Figures:
    """Calibration and confusion of final predictions [N, C]."""
    confidence, answer = logits.double().softmax(1).max(1)
    return {
        "ece": calibration.ece(logits, labels),
        "trust": calibration.trust(confidence, answer == labels),
        "nll": calibration.nll(logits, labels),
        "brier": calibration.brier(logits, labels),
        "reliability": calibration.reliability(logits, labels),
        "confusion": accuracy.confusion(logits.argmax(1), labels, logits.shape[1]),
    }


def likeness(student: Tensor, teacher: Tensor, labels: Tensor) -> Figures:
    """How near predictions [N, C] are; agreement and overlap of the first five in percent, KL in nats.

    The table's rows are the student right and wrong, its columns the teacher: two that are right agree.
    """
    own, other = student.argmax(1), teacher.argmax(1)
    same = int((own == other).sum())
    return {
        "agreement": 100 * same / len(labels),
        "agreement_interval": list(accuracy.wilson(same, len(labels))),
        "agreement_table": fidelity.agreement_table(own, other, labels).tolist(),
        "kl": fidelity.predictive_kl(student, teacher),
        "reverse_kl": fidelity.predictive_kl(teacher, student),
        "top_overlap": fidelity.top_overlap(student, teacher),
        "rank_correlation": fidelity.rank_correlation(student, teacher),
    }


@contextmanager
def watched(nets: Mapping[str, Net], classes: int) -> Iterator[dict[str, list[Tensor]]]:
    """Within the context, what the classifier of each network reads, batch by batch."""
    with ExitStack() as stack:
        yield {who: stack.enter_context(classifier_inputs(net, classes)) for who, net in nets.items()}


def cka(features: Mapping[str, Sequence[Tensor]], samples: int) -> Figures:
    """Linear CKA of what both classifiers read over all ``samples``; nothing where one is not known."""
    parts = [features.get(who) or [] for who in ("student", "teacher")]
    if any(sum(map(len, part)) != samples for part in parts):
        return {}
    own, other = (torch.cat(list(part)) for part in parts)
    return {"cka": fidelity.linear_cka(own, other)}


def cost(nets: Mapping[str, Net], image: Batch, trainable: Mapping[str, int]) -> Figures:
    """Parameters, multiply-adds and latency of each network on one image; of a second path what learns.

    The student's query pass is included; a teacher that shares the query is given it.
    """
    found: Figures = {who: {"trainable": count} for who, count in trainable.items() if who not in nets}
    for who, net in nets.items():
        net.eval()
        told = (
            image
            if net.query_dim is None or who == "student"
            else replace(image, query=_stand_in(net, image))
        )

        def answer(net: Net = net, told: Batch = told) -> Tensor:
            return net.predict(net(told))

        found[who] = {
            "parameters": costs.parameters(net),
            "trainable": trainable[who],
            "multiply_adds": costs.multiply_adds(answer),
            "latency_ms": costs.latency(answer),
        }
    return found


def _stand_in(net: Net, image: Batch) -> Tensor:
    assert net.query_dim is not None
    return image.inputs.new_ones(len(image.inputs), net.query_dim)


def continual(recipe: Any, run: Run, stream: Stream, seen: Sequence[Figures], price: Figures) -> Figures:
    """``result.json`` of a stream: matrices, what follows from them, and the protocol."""
    last = seen[-1]
    result: Figures = {
        "recipe": recipe.name, "scenario": "continual", "seed": run.seed,
        **about(stream.splits), "protocol": protocol(recipe, stream),
        "student": _side("student", stream, seen),
        "teacher": _side("teacher", stream, seen) if "teacher" in last else None,
        "fidelity": None,
        "paths": {who.partition("/")[2]: _side(who, stream, seen) for who in last if "/" in who},
        "cost": {"teacher": None, **price},
    }  # fmt: skip
    if "teacher" in last:
        student, teacher = result["student"], result["teacher"]
        result["fidelity"] = last["fidelity"] | {
            "gap_per_task": _minus(teacher["accuracy_matrix"][-1], student["accuracy_matrix"][-1]),
            "gap_over_tasks": _minus(teacher["running_average"], student["running_average"]),
            "agreement_over_tasks": [each["fidelity"]["agreement"] for each in seen],
        }
    return result


def _side(who: str, stream: Stream, seen: Sequence[Figures]) -> Figures:
    rows = [each[who]["accuracy"] for each in seen]
    matrix = [row + [None] * (len(rows) - len(row)) for row in rows]
    filled = [row + [0.0] * (len(rows) - len(row)) for row in rows]
    last = {k: v for k, v in seen[-1][who].items() if k != "accuracy"}
    return {
        "accuracy_matrix": matrix,
        "average_accuracy": stream_metrics.average_accuracy(filled),
        "incremental_average": stream_metrics.incremental_average(filled),
        "just_learned": stream_metrics.just_learned(filled),
        "forgetting": {name: stream_metrics.forgetting(filled, name) for name in stream_metrics.FORGETTING},
        "running_average": stream_metrics.running_average(filled).tolist(),
        "class_names": list(stream.classes),
        **last,
    }


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def data_name(splits: Splits) -> str:
    """What figures on the test split are labelled with."""
    return splits.train.name.removesuffix(" train")


def about(splits: Splits) -> dict[str, str]:
    """The data's name, licence and source."""
    train = splits.train
    return {"data": data_name(splits), "data_licence": train.licence, "data_source": train.source}


def changed(settings: Any) -> dict[str, Any]:
    """The fields of ``settings`` that differ from their defaults."""
    return {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if getattr(settings, f.name) != f.default
    }


def protocol(recipe: Any, stream: Stream) -> Figures:
    """What a reader must know to compare the figures with others."""
    plan = recipe.scenario
    return {
        "tasks": len(stream), "sizes": list(stream.sizes), "class_order": list(stream.class_order),
        "schedule": plan.schedule, "epochs": plan.epochs,
        "teacher_epochs": plan.teacher_side()[0], "batch": plan.batch_size, "drop_last": plan.drop_last,
        "views": changed(recipe.views), "replay": "none: data of earlier tasks is never read",
        "head_masking": "training: only the current task's classes; test: all classes seen, no task id",
        "evaluated": "last epoch of each task, on the test split; nothing is chosen on it",
        "query": plan.query, "optimiser": f"{plan.optim.name}, fresh in every task",
        "interval": "95 %, of the test sample, not of seeds",
        "forgetting_definitions": dict(stream_metrics.DEFINITIONS),
    }  # fmt: skip


def static(
    logits: Mapping[str, Tensor], labels: Tensor, names: Sequence[str],
    features: Mapping[str, Sequence[Tensor]] | None = None,
) -> Figures:  # fmt: skip
    """Figures on one test set from predictions [N, C] of the student and, where there is one, the teacher.

    Those of a teacher's other path, ``teacher/<path>``, stand under ``paths``, with the student's agreement
    with it and KL(path || student). ``features`` are what the classifiers read, batch by batch, by network.

    Raises:
        NonFiniteError: a prediction is NaN or infinite.
    """
    found: Figures = {"teacher": None, "fidelity": None, "paths": {}}
    for who, values in logits.items():
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"the {who}'s predictions are not finite: lower scenario.optim.lr")
        hits = int((values.argmax(1) == labels).sum())
        into, name = (found, who) if "/" not in who else (found["paths"], who.partition("/")[2])
        into[name] = {
            "accuracy": 100 * hits / len(labels),
            "accuracy_interval": list(accuracy.wilson(hits, len(labels))),
            "class_names": list(names),
            **last_figures(values, labels),
        }
        if into is not found:
            into[name] |= likeness(logits["student"], values, labels)
    if "teacher" in logits:
        alike = likeness(logits["student"], logits["teacher"], labels)
        found["fidelity"] = alike | cka(features or {}, len(labels))
    return found
