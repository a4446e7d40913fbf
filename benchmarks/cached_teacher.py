"""Training with a cached teacher, after the epoch that fills the cache, against training without a teacher.

Both sides are whole stages of ``fit`` with the same student on the same replayed views. With a teacher the
student learns from labels and from the teacher's logits, which are read from the cache; alone it learns from
labels. Query features are cached on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pairs import Ready, Setting, Timed, random_weights
from side_by_side import arguments, in_turn, medians, ratio, scratch_run, write

from limbeck.data.views import Views
from limbeck.engine.distillation import Ask
from limbeck.engine.fit import Turn, fit
from limbeck.scenarios.pair import constants

REQUIRED = 1.05
STEPS = 200
TAUGHT, ALONE = "cdl-kd", "continual"


def stages(ready: Ready, source: Timed, ask: Ask | None) -> Callable[[], None]:
    """Each call is a new stage of the student's phase."""
    pair, optim = ready.pair, ready.recipe.scenario.optim
    module = pair.distillation(ready.window, ask)
    frozen = constants({"student": pair.student})
    if pair.teacher is not None:
        frozen["teacher"] = pair.teacher

    def stage() -> None:
        turn = Turn("student", module, optim, frozen)
        fit(pair.run, f"stage{len(pair.run.done)}", [turn], source, STEPS // source.steps)

    return stage


def measure(threads: int, setting: Setting, alone: Setting, repeats: int) -> dict[str, Any]:
    """Stages of both, in turn."""
    with scratch_run(threads) as first, scratch_run(threads) as second:
        taught, single = setting.build(first), alone.build(second)
        views = Views(count=1, scale=(0.5, 1.0), flip=0.5)
        batches = taught.batches(views)
        captured = taught.pair.captured_teacher(batches, epochs=STEPS)
        assert captured is not None
        sources = {
            "cached": Timed(taught.pair.source(batches)), "alone": Timed(single.pair.source(batches)),
        }  # fmt: skip
        began = time.perf_counter()
        captured(next(iter(batches.epoch(0))))
        filled = time.perf_counter() - began
        sides = {
            "cached": stages(taught, sources["cached"], taught.pair.remembered(captured)),
            "alone": stages(single, sources["alone"], None),
        }
        times = in_turn(sides, repeats, warmup=1)
        steps = {name: source.laps[STEPS:] for name, source in sources.items()}
        return taught.shape() | {
            "ratio": ratio(times, "cached", "alone"), "required": REQUIRED,
            "stage_ms": medians(times), "steps": STEPS,
            "ratio_of_step": ratio(steps, "cached", "alone"), "step_ms": medians(steps),
            "fill_ms": round(1000 * filled, 3),
        }  # fmt: skip


def main() -> None:
    """Measure a pair of middling size and the shipped one."""
    given = arguments(__doc__, 5, "cached_teacher.json").parse_args()
    middling = random_weights("vit_tiny_patch16_224", "vit_small_patch16_224")
    student = [item for item in middling if not item.startswith("teacher.")]
    shipped = [item for item in given.set if not item.startswith("teacher.")]
    figures = [
        measure(
            given.threads,
            Setting(TAUGHT, sets, size, batch, 5 * batch),
            Setting(ALONE, own, size, batch, 5 * batch),
            given.repeats,
        )
        for sets, own, size, batch in ((middling, student, 64, 16), (given.set, shipped, 28, 50))
    ]
    write(given.out, given.repeats, figures)


if __name__ == "__main__":
    main()
