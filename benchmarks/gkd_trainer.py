"""A whole training of a small language model by KL, 60 steps, against TRL's GKDTrainer with lambda = 0.

Both sides start from one folder of weights, read the same rows of tokens, 12 steps to an epoch, and take the
same steps of AdamW. Losses of a batch are compared first. TRL's side is ``GKDTrainer.train()`` without log
and checkpoints (beta = 0: KL from the teacher); limbeck's is a whole stage of ``fit``, with log, guards and
checkpoint. Times are of the processors, all threads together. Several settings, since it depends on them: the
larger the networks beside the vocabulary, the less is there to be gained from the loss; the longer the
prompts, of which nothing is learnt, the more; and the larger the teacher, the more from its cache.

live: the teacher answers each batch.
cached: the teacher's hidden states are kept in the first of five epochs: the same loss.
cached_top: its 64 likeliest tokens alone are kept, all others as one outcome.

``times_as_fast_at_most`` is what the passes leave to be gained: the way of both networks to their hidden
states, the student's way back, and the four products with the heads over the tokens that count. A cached
teacher goes its way in the first epoch alone, and where its top tokens are cached its product is made there
alone too. No exact training is faster.

TRL is no requirement of limbeck. It is read from PYTHONPATH, where

    pip install trl==1.16.0 --no-deps --target FOLDER

has put it.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from side_by_side import arguments, scratch_run, write

from limbeck import config
from limbeck.config import Recipe
from limbeck.contracts import Progress, Spec
from limbeck.data.tokenizers import tokenizer_of
from limbeck.nets.causal_lm import answer, language_model
from limbeck.scenarios.language import Desk
from limbeck.students.llama import LlamaStudent

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
try:
    import datasets
    import transformers
    from trl.experimental.gkd import GKDConfig, GKDTrainer
except ImportError as missing:
    raise SystemExit(f"{missing}: {(__doc__ or '').split('limbeck. ')[-1]}") from None

REQUIRED = {"live": 1.5, "cached": 3.0, "cached_top": 3.0}  # times the CPU time of GKDTrainer
ROWS, BATCH, EPOCHS, LENGTH, RATE = 96, 8, 5, 128, 1e-3
VOCABULARY = 4096
Shape = dict[str, int]
TINY, SMALL = {"layers": 2, "width": 64, "heads": 2}, {"layers": 2, "width": 128, "heads": 4}
SETTINGS: tuple[tuple[Shape, Shape, int], ...] = (  # student, teacher, tokens of each row's prompt
    (TINY, {"layers": 4, "width": 128, "heads": 4}, 1),
    (TINY, {"layers": 4, "width": 128, "heads": 4}, LENGTH // 2),
    (SMALL, {"layers": 6, "width": 256, "heads": 8}, 1),
    (SMALL, {"layers": 6, "width": 256, "heads": 8}, LENGTH // 2),
    (SMALL, {"layers": 12, "width": 384, "heads": 6}, LENGTH // 2),
)
ENGINE: dict[str, dict[str, Any]] = {
    "live": {"cache": False}, "cached": {}, "cached_top": {"cache_top_k": 64}
}  # fmt: skip


def folders(place: Path, student: Shape, teacher: Shape) -> tuple[Path, Path]:
    """A teacher and a student with random weights and their tokenizer, as transformers keeps them."""
    texts = config.build(recipe(place, place, {})).data.load()
    tokenizer = tokenizer_of(f"bpe:{VOCABULARY}", texts.train)
    for name, shape in (("teacher", teacher), ("student", student)):
        net: Any = LlamaStudent(**shape).build(
            Spec(classes=VOCABULARY, size=LENGTH), torch.Generator().manual_seed(len(name))
        )
        with torch.no_grad():
            net.unembedding().weight.mul_(4)  # opinions that differ from token to token
        net.tokenizer = tokenizer
        net.save(place / name)
    return place / "teacher", place / "student"


def recipe(teacher: Path, student: Path, engine: dict[str, Any]) -> dict[str, Any]:
    """The training as limbeck is told it."""
    return {
        "name": "benchmark",
        "teacher": {"name": "causal_lm", "model": str(teacher)},
        "student": {"name": "causal_lm", "model": str(student)},
        "objective": [{"name": "divergence", "kind": "forward_kl"}],
        "scenario": {
            "name": "language", "epochs": EPOCHS, "batch_size": BATCH,
            "optim": {"name": "adamw", "lr": RATE, "schedule": "constant", "clip": 1.0},
        },
        "data": {"name": "python_texts", "length": LENGTH, "pack": False, "tokenizer": None},
        "engine": engine | {"device": "cpu"},
    }  # fmt: skip


def desk_of(asked: Recipe, run: Any, prompt: int) -> Desk:
    """The recipe's texts, of which the first full rows are learnt, but for the first ``prompt`` tokens."""
    desk = Desk(asked.scenario, asked, run)
    rows = desk.learning.rows
    full = (rows.following != -100).all(1).nonzero()[:ROWS, 0]
    desk.learning = desk.learning.subset(full)
    desk.learning.rows.following[:, : prompt - 1] = -100
    return desk


def limbeck_seconds(threads: int, places: tuple[Path, Path], engine: dict[str, Any], prompt: int) -> float:
    """CPU seconds of the stage in which the student learns."""
    asked = config.build(recipe(*places, engine))
    with scratch_run(threads) as run:
        run.settings = replace(run.settings, **engine)
        desk = desk_of(asked, run, prompt)
        began = time.process_time()
        asked.scenario.train(desk.pair, desk, asked.selector.prepare(None))
        return time.process_time() - began


def passes_seconds(threads: int, places: tuple[Path, Path], side: str, prompt: int) -> float:
    """CPU seconds of the networks' passes alone."""
    with scratch_run(threads) as run:
        desk = desk_of(config.build(recipe(*places, {})), run, prompt)
        own, other = (language_model(net).network.train() for net in (desk.pair.student, desk.pair.teacher))
        began, taught = time.process_time(), None
        for epoch in range(EPOCHS):
            asks, projects = epoch == 0 or side == "live", epoch == 0 or side != "cached_top"
            for batch in desk.learning.in_order(BATCH).epoch(epoch):
                with torch.no_grad():
                    if asks or taught is None:
                        taught = answer(other, batch, logits=False)
                    if projects:
                        torch.mm(taught.hidden, taught.unembedding.weight.mT)
                said = answer(own, batch, logits=False)
                with torch.no_grad():
                    slope = said.hidden @ said.unembedding.weight.mT
                    torch.mm(slope.mT, said.hidden)
                    back = slope @ said.unembedding.weight
                said.hidden.backward(back)
        return time.process_time() - began


def trl_trainer(places: tuple[Path, Path], rows: torch.Tensor, folder: str, prompt: int) -> Any:
    """GKDTrainer on the same rows [N, T + 1]."""
    teacher, student = (transformers.AutoModelForCausalLM.from_pretrained(place) for place in places)
    tokenizer = transformers.AutoTokenizer.from_pretrained(places[1])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    plan = GKDConfig(
        output_dir=folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0, lmbda=0.0, beta=0.0,
        temperature=1.0, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=False, max_length=LENGTH + 1,
    )  # fmt: skip

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([item["input_ids"] for item in items])
        ones, labels = torch.ones_like(ids), ids.clone()
        labels[:, :prompt] = -100
        return {
            "input_ids": ids, "attention_mask": ones, "labels": labels,
            "prompts": ids[:, :prompt], "prompt_attention_mask": ones[:, :prompt],
        }  # fmt: skip

    return GKDTrainer(
        model=student, teacher_model=teacher, args=plan, data_collator=collate, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows.tolist()}),
    )  # fmt: skip


def measure(threads: int, repeats: int, student: Shape, teacher: Shape, prompt: int) -> list[dict[str, Any]]:
    """One setting: whole trainings in turn, each from the same start."""
    with tempfile.TemporaryDirectory() as name:
        places = folders(Path(name), student, teacher)
        tokens = compared(threads, places, name, prompt)
        times: dict[str, list[float]] = {"trl": [], **{side: [] for side in ENGINE}}
        least: dict[str, list[float]] = {side: [] for side in ENGINE}
        for _ in range(repeats):
            trainer = trl_trainer(places, tokens, name, prompt)
            began = time.process_time()
            trainer.train()
            times["trl"].append(time.process_time() - began)
            assert trainer.state.global_step == ROWS // BATCH * EPOCHS
            for side, engine in ENGINE.items():
                times[side].append(limbeck_seconds(threads, places, engine, prompt))
                least[side].append(passes_seconds(threads, places, side, prompt))
    seconds = {side: median(values) for side, values in times.items()}
    passes = {side: median(values) for side, values in least.items()}
    return [
        {
            "side": side, "steps": ROWS // BATCH * EPOCHS, "batch": BATCH, "length": LENGTH,
            "prompt": prompt, "vocabulary": VOCABULARY, "student": student, "teacher": teacher,
            "cpu_seconds": round(seconds[side], 2), "trl_cpu_seconds": round(seconds["trl"], 2),
            "passes_cpu_seconds": round(passes[side], 2),
            "times_as_fast": round(seconds["trl"] / seconds[side], 2),
            "times_as_fast_at_most": round(seconds["trl"] / passes[side], 2), "required": required,
        }
        for side, required in REQUIRED.items()
    ]  # fmt: skip


def compared(threads: int, places: tuple[Path, Path], folder: str, prompt: int) -> torch.Tensor:
    """The rows [N, T + 1] that both sides read; stops where their losses differ."""
    with scratch_run(threads) as run:
        desk = desk_of(config.build(recipe(*places, {})), run, prompt)
        rows, index = desk.learning.rows, desk.learning.index
        tokens = torch.cat([rows.ids[index], rows.following[index][:, -1:]], 1)
        ours = first_loss(desk)
    theirs = first_loss_of(trl_trainer(places, tokens, folder, prompt))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    return tokens


@torch.no_grad()
def first_loss(desk: Desk) -> torch.Tensor:
    """limbeck's loss of the first rows."""
    batch = next(iter(desk.learning.in_order(BATCH).epoch(0)))
    pair = desk.pair
    pair.teach(False)
    terms = pair.distillation(None, pair.ask_live)(batch, Progress())
    return torch.stack(list(terms.values())).sum()


@torch.no_grad()
def first_loss_of(trainer: Any) -> torch.Tensor:
    """TRL's loss of the same rows."""
    first = [trainer.train_dataset[place] for place in range(BATCH)]
    found: torch.Tensor = trainer.compute_loss(trainer.model, trainer.data_collator(first))
    return found


def main() -> None:
    """Measure each setting."""
    given = arguments(__doc__, 3, "gkd_trainer.json").parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(given.threads)
    figures = [row for each in SETTINGS for row in measure(given.threads, given.repeats, *each)]
    write(given.out, given.repeats, figures)


if __name__ == "__main__":
    main()
