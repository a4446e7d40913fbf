"""Memory and time of relation losses taken in parts, against the same all at once.

A call is a forward and a backward pass on features [N, 64] of both networks. The peak is the most that the
call holds at a time, by torch's own count of what it allocates and frees. Value and gradient of both sides
are compared. All at once, the angles of N samples are N³ numbers in each of several tensors, so that they are
left out from 1024 samples on; in parts, the angles at the first ANCHORS of 4096 samples stand for the others,
which each take as long and give their memory back.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from side_by_side import HERE, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from limbeck import losses
from limbeck.losses import relations

SIZES = (256, 1024, 4096)
WIDTH, ANCHORS = 64, 4
MOST = 256**3  # relations that are tried all at once where they are triples
RELATIONS: dict[str, Callable[..., Tensor]] = {
    "similarities": losses.similarity_relations,
    "distances": losses.distance_relations,
    "angles": losses.angle_relations,
}


def features(count: int) -> tuple[Tensor, Tensor]:
    """Random features of both networks."""
    generator = torch.Generator().manual_seed(count)
    own, other = (torch.randn(count, WIDTH, generator=generator) for _ in range(2))
    return own.requires_grad_(), other


@contextmanager
def first(anchors: int | None) -> Iterator[None]:
    """Losses go over the first ``anchors`` samples alone; None = over all."""
    in_parts = relations._in_parts

    def few(items: Callable[[slice], Tensor], count: int, rows: int) -> Tensor:
        return in_parts(items, min(count, anchors or count), rows)

    with patch.object(relations, "_in_parts", few):
        yield


def call(name: str, count: int, whole: bool, anchors: int | None) -> tuple[float, Tensor, Tensor]:
    """Seconds, value and gradient of one forward and backward pass."""
    own, other = features(count)
    with first(anchors):
        began = time.perf_counter()
        value = RELATIONS[name](own, other, rows=count if whole else None)
        value.backward()
        seconds = time.perf_counter() - began
    assert own.grad is not None
    return seconds, value.detach(), own.grad


def peak_mb(name: str, count: int, whole: bool, anchors: int | None) -> float:
    """The most that a call holds at a time, in MB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call(name, count, whole, anchors)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return round(max(accumulate(changes)) / 2**20, 1)


def measure(name: str, count: int, repeats: int) -> dict[str, Any]:
    """One loss at one batch size: in parts, and all at once where that fits."""
    triples = name == "angles"
    fits, anchors = not triples or count**3 <= MOST, ANCHORS if triples and count > 1024 else None
    ways = {"parts": False} | ({"whole": True} if fits else {})
    times: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    call(name, 8, True, None)
    for _ in range(repeats):
        for way, whole in ways.items():
            seconds, *found[way] = call(name, count, whole, anchors)
            times[way].append(seconds)
    if fits:
        torch.testing.assert_close(found["parts"], found["whole"], rtol=1e-4, atol=1e-8)
    peaks = {way: peak_mb(name, count, whole, anchors) for way, whole in ways.items()}
    row = {"relation": name, "batch": count, "anchors": anchors or count, "peak_mb": peaks}
    row |= {"ms": {way: round(1000 * median(t), 1) for way, t in times.items()}}
    if fits:
        row["ratio_of_peak"] = round(peaks["parts"] / peaks["whole"], 3)
        row["ratio_of_time"] = round(median(times["parts"]) / median(times["whole"]), 3)
    return row


def main() -> None:
    """Measure all losses at all sizes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--out", type=Path, default=HERE / "relation_memory.json", help="the JSON to write")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    figures = [measure(name, count, given.repeats) for name in RELATIONS for count in SIZES]
    write(given.out, given.repeats, figures)


if __name__ == "__main__":
    main()
