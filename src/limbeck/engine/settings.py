"""How a run is carried out: the machine's side of a recipe. Nothing here changes what is computed, except
``precision``, ``compile``, ``cache_top_k``, a reduced ``cache_dtype`` and, in the last bits, ``device`` and
``threads``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from limbeck.engine.tracking import check_names
from limbeck.errors import ConfigError

LEAST = (("checkpoint_seconds", 0), ("keep_checkpoints", 2), ("log_every", 1), ("diagnose_every", 0))


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Settings of the engine.

    Attributes:
        device: ``auto`` takes CUDA where there is one, else the CPU.
        precision: ``bf16`` runs forward passes under autocast; weights stay float32.
        compile: wrap each training step in ``torch.compile``.
        threads: CPU threads; None keeps torch's own number. Equal results need equal threads.
        checkpoint_seconds: time between checkpoints within a stage; every stage's end writes one.
        keep_checkpoints: how many of the newest stay on disk (at least 2, so that a damaged one has
            one before it).
        log_every: steps between logged points.
        diagnose_every: steps between measurements of each term's share of the gradient; 0 = never.
        cache: keep query features and a frozen teacher's outputs on disk where views are replayed.
        cache_root: folder of the caches that runs share; None = ``.cache`` beside the run's folder.
        cache_dtype: storage type of cached outputs; ``float16`` halves the size and rounds.
        cache_top_k: keep only so many of a teacher's largest logits, and the mass of the rest, which is then
            spread evenly: exact at temperature 1 for what is kept. So too where nothing is cached, and the
            teacher is asked live. None = all logits.
        share_teacher_cache: keep a frozen teacher's outputs with the caches that runs share, for others with
            the same teacher and data; else each run captures its own and deletes it.
        shard: whose blocks ranks share out among them, where there are several: each then holds a part of
            their weights and of what the optimiser remembers of them, and a shared teacher is asked live.
        reuse_teachers: take a teacher that an earlier run trained in exactly the same way.
        track: ``trackio``, ``tensorboard`` and ``mlflow``: tell them what is logged too, in ``tracking/`` of
            the run's folder.
    """

    device: str = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    threads: int | None = None
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = 2
    log_every: int = 10
    diagnose_every: int = 100
    cache: bool = True
    cache_root: str | None = None
    cache_dtype: Literal["float32", "float16"] = "float32"
    cache_top_k: int | None = None
    share_teacher_cache: bool = False
    shard: Literal["none", "teacher", "student", "both"] = "none"
    reuse_teachers: bool = True
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in LEAST:
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: allowed are values of at least {least}")
        if self.cache_top_k is not None and self.cache_top_k < 1:
            raise ConfigError(f"cache_top_k is {self.cache_top_k}: allowed are 1 and more, or null for all")
        check_names(self.track)
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}: allowed are 1 and more, or null for torch's own")

    def shards(self, who: str) -> bool:
        """Whether the ``teacher`` or the ``student`` is shared out."""
        return self.shard in (who, "both")

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Within the context, torch has as many threads as are asked for."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def torch_device(self) -> torch.device:
        """The device to run on.

        Raises:
            ConfigError: ``device`` is no device of this machine.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"device {self.device!r} is not to be had ({why}): use auto or cpu") from error
        return device
