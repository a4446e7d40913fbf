"""Token losses from hidden states, forward and backward, against TRL's and Liger's on the same tensors.

A call takes hidden states of both networks and both heads, and gives the loss and the gradients of the
student's states and head. Half of the tokens count, or all. Loss and gradients are compared before anything
is timed. ``limbeck_top`` knows the teacher's 64 likeliest tokens alone, as from a cache: another loss, so it
is compared with its own plain form instead. The peers are TRL's chunked divergence, TRL's generalised JSD on
whole logits, and Liger's chunked JSD, as shipped (compiled) and as plain torch; beta = 0 is KL in all three.
They project every token, whether it counts or not. ``products`` is the four matrix products over the tokens
that count and nothing else: no exact way to the gradients is faster, so ``times_as_fast_at_most`` is what
could be had.

Times that are compared are CPU time, of all threads together. With ``--device cuda`` they are by the clock,
shapes are those of a GPU, Liger's Triton kernel is one more peer, and the peak is that of CUDA's allocator.
The peak is the most that a call holds at a time, gradients with it, by torch's own count of what it allocates
and frees. ``growth`` is what a call holds beyond the gradients that it is asked for, by the number of tokens,
on narrow networks.

TRL and Liger are no requirements of limbeck. They are read from PYTHONPATH, where

    pip install trl==1.16.0 liger-kernel==0.8.5 --no-deps --target FOLDER

has put them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from side_by_side import arguments, settle, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from limbeck.contracts import Unembedding
from limbeck.losses import JSD, Divergence, ForwardKL, TopTokens, top_divergence
from limbeck.losses.chunked import Hidden, chunked, release

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
try:  # behind limbeck's networks, which make torchvision importable beside a CPU-only torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
except ImportError as missing:
    raise SystemExit(f"{missing}: {(__doc__ or '').split('limbeck. ')[-1]}") from None

TOP = 64
REQUIRED, REQUIRED_TOP = 2.0, 1.5  # times the CPU time of the fastest peer; of the live teacher
DIVERGENCES: dict[str, tuple[float, Divergence]] = {"KL": (0.0, ForwardKL()), "JSD": (0.5, JSD(0.5))}
GROWTH = (1024, 4096, 16384)
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """The vocabulary, the tokens of a batch, and the widths of student and teacher."""

    vocabulary: int
    tokens: int
    student: int
    teacher: int


SHAPES = (
    Shape(32_000, 512, 256, 576),
    Shape(32_000, 512, 576, 1024),
    Shape(128_000, 256, 576, 1024),
)
CUDA_SHAPES = (Shape(32_000, 8192, 2048, 4096), Shape(128_000, 8192, 2048, 4096))


class Pair:
    """Hidden states and heads of both networks, and which tokens count."""

    def __init__(self, shape: Shape, share: float, device: str) -> None:
        generator = torch.Generator(device).manual_seed(shape.tokens)
        draw = partial(torch.randn, generator=generator, device=device)
        self.own, self.other = (draw(shape.tokens, d) for d in widths(shape))
        self.head, self.head_t = (2 * draw(shape.vocabulary, d) / d**0.5 for d in widths(shape))
        self.own.requires_grad_()
        self.head.requires_grad_()
        self.labels = torch.randint(shape.vocabulary, (shape.tokens,), generator=generator, device=device)
        self.counts = torch.randperm(shape.tokens, generator=generator, device=device) < share * shape.tokens
        self.labels[~self.counts] = -100
        self.rows = self.counts.nonzero()[:, 0]

    @property
    def student(self) -> Hidden:
        return Hidden(self.own.index_select(0, self.rows), Unembedding(self.head))

    def limbeck(self, divergence: Divergence) -> Tensor:
        teacher = Hidden(self.other.index_select(0, self.rows), Unembedding(self.head_t))
        return chunked(self.student, divergence, teacher).loss

    def limbeck_top(self, divergence: Divergence, known: TopTokens) -> Tensor:
        return chunked(self.student, divergence, known).loss

    def trl(self, beta: float) -> Tensor:
        found: Tensor = _chunked_divergence_loss(
            self.own[None], self.other[None], self.head, self.head_t, self.counts[None], beta
        )[0]
        return found

    def trl_whole(self, beta: float) -> Tensor:
        with torch.no_grad():
            teacher = self.other @ self.head_t.mT
        found: Tensor = GKDTrainer.generalized_jsd_loss(
            (self.own @ self.head.mT)[None], teacher[None], labels=self.labels[None], beta=beta
        )
        return found

    def liger(self, beta: float, *, compiled: bool) -> Tensor:
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled
        )
        found: Tensor = loss(self.own, self.head, self.other, self.head_t, self.labels)
        return found

    def liger_triton(self, beta: float) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearJSD  # wants Triton, which comes with CUDA

        found: Tensor = LigerFusedLinearJSD(jsd_beta=beta)(
            self.own, self.head, self.other, self.head_t, self.labels
        )
        return found

    @torch.no_grad()
    def products(self) -> None:
        """What no exact way can do without: the logits of both, the gradients of states and head."""
        own, other = self.own[self.rows], self.other[self.rows]
        torch.mm(other, self.head_t.mT)
        slope = own @ self.head.mT
        torch.mm(slope, self.head)
        torch.mm(slope.mT, own)

    def known(self) -> TopTokens:
        """The teacher's likeliest tokens at the rows that count."""
        log_probs, ids = (self.other[self.rows] @ self.head_t.mT).log_softmax(-1).topk(TOP)
        return TopTokens(ids, log_probs)

    def gradients(self, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """One call: the loss, and the gradients of states and head."""
        value = loss()
        own, head = torch.autograd.grad(value, (self.own, self.head))
        return value.detach(), own, head


def widths(shape: Shape) -> tuple[int, int]:
    return shape.student, shape.teacher


def sides(pair: Pair, beta: float, divergence: Divergence) -> dict[str, Loss]:
    """Each way to the loss by name."""
    triton = {"liger_triton": partial(pair.liger_triton, beta)} if pair.own.is_cuda else {}
    return triton | {
        "limbeck": partial(pair.limbeck, divergence),
        "limbeck_top": partial(pair.limbeck_top, divergence, pair.known()),
        "trl": partial(pair.trl, beta),
        "trl_whole": partial(pair.trl_whole, beta),
        "liger": partial(pair.liger, beta, compiled=True),
        "liger_plain": partial(pair.liger, beta, compiled=False),
    }


def check(pair: Pair, divergence: Divergence, ways: dict[str, Loss]) -> dict[str, float]:
    """How far each peer's loss and gradients are from ours, at most; stops where that is too far."""
    ours = pair.gradients(ways["limbeck"])
    logits = pair.own[pair.rows] @ pair.head.mT
    plain = partial(top_divergence, divergence, logits, pair.known())
    worst = {"loss": 0.0, "gradient": 0.0}
    others = {name: way for name, way in ways.items() if name not in ("limbeck", "limbeck_top")}
    pairs = [(name, ours, pair.gradients(way)) for name, way in others.items()]
    pairs.append(("limbeck_top", pair.gradients(ways["limbeck_top"]), pair.gradients(plain)))
    for name, mine, its in pairs:
        apart = [((a - b).norm() / b.norm()).item() for a, b in zip(mine, its, strict=True)]
        if apart[0] > 1e-5 or max(apart[1:]) > 1e-4:
            raise SystemExit(f"{name}: loss and gradients differ by {apart} of their size")
        worst = {"loss": max(worst["loss"], apart[0]), "gradient": max(worst["gradient"], *apart[1:])}
    return worst


def timed(pair: Pair, ways: dict[str, Loss], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each side in turn: of the processors, and by the clock."""
    calls: dict[str, Callable[[], object]] = {
        name: partial(pair.gradients, way) for name, way in ways.items()
    }
    calls["products"] = pair.products
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            settle()
            began = time.process_time(), time.perf_counter()
            call()
            settle()
            spent[name].append((time.process_time() - began[0], time.perf_counter() - began[1]))
    return {
        what: {name: round(1000 * median(t[place] for t in times), 1) for name, times in spent.items()}
        for place, what in enumerate(("cpu_ms", "wall_ms"))
    }


def peak_mb(pair: Pair, way: Loss) -> float:
    """The most that a call holds at a time, in MB, with what it keeps for the next one."""
    release()
    if pair.own.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pair.gradients(way)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        pair.gradients(way)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return round(max(accumulate(changes)) / 2**20, 1)


def measure(shape: Shape, share: float, name: str, repeats: int, device: str) -> dict[str, Any]:
    """All sides at one shape."""
    pair, (beta, divergence) = Pair(shape, share, device), DIVERGENCES[name]
    ways = sides(pair, beta, divergence)
    apart, spent = check(pair, divergence, ways), timed(pair, ways, repeats)
    peaks = {side: peak_mb(pair, way) for side, way in ways.items()}
    ms = spent["wall_ms" if pair.own.is_cuda else "cpu_ms"]
    peers = [side for side in ways if not side.startswith("limbeck")]
    best, least = min(ms[side] for side in peers), min(peaks[side] for side in peers)
    return {
        "divergence": name,
        **vars(shape),
        "counted": len(pair.rows),
        **spent,
        "peak_mb": peaks,
        "apart": apart,
        "times_as_fast": round(best / ms["limbeck"], 2),
        "times_as_fast_at_most": round(best / ms["products"], 2),
        "required": REQUIRED,
        "top_times_as_fast": round(ms["limbeck"] / ms["limbeck_top"], 2),
        "required_top": REQUIRED_TOP,
        "peak_ratio": round(peaks["limbeck"] / least, 2),
    }


def growth(device: str) -> Iterator[dict[str, Any]]:
    """Memory beyond the gradients, by the number of tokens, with a live and with a cached teacher."""
    for tokens in GROWTH:
        pair = Pair(Shape(32_000, tokens, 32, 32), 1.0, device)
        asked = (pair.own.nbytes + pair.head.nbytes) / 2**20
        ids = torch.arange(TOP, device=device).expand(tokens, TOP)
        known = TopTokens(ids, torch.full((tokens, TOP), 0.5 / TOP, device=device).log())
        ways = {
            "limbeck": partial(pair.limbeck, ForwardKL()),
            "limbeck_top": partial(pair.limbeck_top, ForwardKL(), known),
        }
        beyond = {side: round(peak_mb(pair, way) - asked, 1) for side, way in ways.items()}
        yield {"growth": tokens, "vocabulary": 32_000, "beyond_gradients_mb": beyond}


def main() -> None:
    """Measure all shapes."""
    given = arguments(__doc__, 3, "vocabulary_losses.json").parse_args()
    torch.set_num_threads(given.threads)
    figures = [
        measure(shape, share, name, given.repeats, given.device)
        for shape in (SHAPES if given.device == "cpu" else CUDA_SHAPES)
        for share in (0.5, 1.0)
        for name in DIVERGENCES
    ]
    write(given.out, given.repeats, [*figures, *growth(given.device)])


if __name__ == "__main__":
    main()
