"""The figures of language models at the end of a run: both networks, and those cut out of the student."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from limbeck.contracts import Batch, Net, Outputs
from limbeck.data.tokens import TokenBatches
from limbeck.engine.fit import autocast
from limbeck.metrics import cost as costs
from limbeck.scenarios import token_figures
from limbeck.scenarios.pair import Pair, project

Figures = dict[str, Any]


def judged(pair: Pair, test: TokenBatches) -> Figures:
    """What ``result.json`` says of the networks: figures over the tokens of ``test``, and cost.

    Those of a network that was cut out of the student stand under ``nested`` and its name.
    """
    nested = pair.student.nested()
    for part in nested.values():
        project(part.net, False)
    nets = pair.nets() | {name: part.net for name, part in nested.items()}
    said, near = answers(pair, nets, test)
    here = {who: net.deployed() for who, net in nets.items() if who != "teacher" or who in pair.here()}
    spent, learning = cost(pair, here, test), pair.trainable()
    found: Figures = {"teacher": None, "fidelity": near.get("student"), "paths": {}}
    found |= {who: said[who] for who in pair.nets() if who in said}
    found["cost"] = {"teacher": None} | {
        who: {"parameters": spent[who]["parameters"], "trainable": learning[who], **spent[who]}
        for who in pair.nets()
        if who in spent
    }
    if nested:
        found["nested"] = {
            name: {**part.about, **said[name], "fidelity": near.get(name), "cost": spent[name]}
            for name, part in nested.items()
        }
    return found


@torch.no_grad()
def answers(
    pair: Pair, nets: Mapping[str, Net], test: TokenBatches
) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Each network's figures over the tokens of ``test``, and how near each is to the teacher, by name.

    A served teacher has no figures of its own.
    """
    said: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
    near: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
    for net in nets.values():
        net.eval()
    for batch in pair.run.over("evaluation", test):
        moved = batch.to(pair.run.device)
        read = {who: pair.told(moved) if who == "teacher" else moved for who in nets}
        with autocast(pair.run):
            given = {who: net(read[who]) for who, net in nets.items()}
        for who, answer in given.items():
            if answer.top is None:
                said[who].append(token_figures.told(answer, read[who], test.labels[batch.index]))
            if who != "teacher" and "teacher" in given and batch.other is None:
                near[who].append(token_figures.compared(answer, given["teacher"], moved.labels))
    return (
        {who: token_figures.side(_whole(parts), test.rows.domains) for who, parts in said.items()},
        {who: token_figures.between(_whole(parts)) for who, parts in near.items()},
    )


def _whole(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def cost(pair: Pair, nets: Mapping[str, Net], test: TokenBatches) -> dict[str, Figures]:
    """Parameters, multiply-adds and latency of each network on one row of tokens, with all its logits."""
    batch = next(iter(test.in_order(1).epoch(0))).to(pair.run.device)
    found: dict[str, Figures] = {}
    for who, net in nets.items():
        read = pair.told(batch) if who == "teacher" else batch
        answer = partial(all_logits, net, read)

        found[who] = {
            "parameters": costs.parameters(net),
            "multiply_adds": costs.multiply_adds(answer),
            "latency_ms": costs.latency(answer),
        }
    return found


def all_logits(net: Net, batch: Batch) -> Tensor:
    """The logits [R, V] of a language model, whoever reads them."""
    outputs: Outputs = net(batch)
    if outputs.logits.shape[1]:
        return outputs.logits
    assert outputs.hidden is not None and outputs.unembedding is not None
    return outputs.unembedding.logits(outputs.hidden)
