"""A student as an ONNX file, checked against the student itself."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.config import Recipe
from limbeck.contracts import Batch, Net
from limbeck.data.batches import Batches
from limbeck.engine.state import write_atomically
from limbeck.errors import ConfigError, DataError, GuardError
from limbeck.scenarios.fit_together import inputs, load_data

NEEDED = ("onnx", "onnxruntime", "onnxscript")
CHECKED = 256
"""So many test inputs are compared."""
TOLERANCE = 1e-3
"""Largest difference of the logits, as a share of the largest logit, that passes for rounding."""


@dataclass(frozen=True)
class Checked:
    """An ONNX file and how close it is to the student.

    Attributes:
        file: the file.
        difference: largest absolute difference of a logit.
        scale: largest absolute logit.
        samples: inputs that were compared.
    """

    file: Path
    difference: float
    scale: float
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "file": self.file.name,
            "difference": self.difference,
            "largest_logit": self.scale,
            "samples": self.samples,
        }


class Answer(nn.Module):
    """What a student answers: images [B, C, H, W] as it reads them to logits [B, classes]."""

    def __init__(self, student: Net) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        """The logits that the student predicts with, of both its heads where it has two."""
        none = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device)
        return self.student.predict(self.student(Batch(inputs=images, labels=none, index=none, view=none)))


def test_images(recipe: Recipe, count: int = CHECKED) -> Tensor:
    """The first ``count`` test images [count, C, H, W] of a recipe's data, as its student reads them.

    Raises:
        ConfigError: its student is a language model.
    """
    if recipe.student.reads_text():
        raise ConfigError(
            "the student is a language model, which is not written as ONNX: load student/ with transformers"
        )
    form = inputs(recipe)
    images = Batches(
        load_data(recipe).test, batch_size=count, shuffle=False,
        size=form.size, channels=form.channels, mean=form.mean, std=form.std,
    )  # fmt: skip
    return next(iter(images.epoch(0))).inputs


def to_onnx(student: nn.Module, examples: Tensor, path: Path) -> Checked:
    """Write a module that maps images to logits as ONNX, with a free batch axis, and check the file.

    Args:
        student: in evaluation mode.
        examples: real inputs [N, ...], N >= 2, that both are asked.
        path: the file; one that stood there is replaced once the check has passed.

    Raises:
        ConfigError: a package of the extra ``export`` is missing, or the network cannot be written as ONNX.
        DataError: fewer than two inputs.
        GuardError: the file answers otherwise than the student.
    """
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        raise ConfigError(
            f"ONNX needs {', '.join(lacking)}, not installed here: pip install 'limbeck[export]'"
        )
    if len(examples) < 2:
        raise DataError(f"{len(examples)} input: ONNX is checked with batches of two sizes, give at least 2")
    with TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        _write(student, examples[:2], made)
        found = _check(student, examples, made, path)
        write_atomically(path, partial(_copy, made))
    return found


def _copy(made: Path, to: Path) -> None:
    shutil.copyfile(made, to)


def _write(student: nn.Module, example: Tensor, to: Path) -> None:
    free = ({0: torch.export.Dim("batch")},)
    try:
        with _silent():
            program = torch.export.export(student, (example,), dynamic_shapes=free, strict=False)
            torch.onnx.export(
                program, (), to, dynamo=True, external_data=False, input_names=["input"],
                output_names=["logits"],
            )  # fmt: skip
    except Exception as error:  # of several packages and many families
        cause = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"this student cannot be written as ONNX ({type(error).__name__}: {cause}): use its safetensors"
        ) from error


@torch.no_grad()
def _check(student: nn.Module, examples: Tensor, file: Path, name: Path) -> Checked:
    """Ask both, all inputs at once and the first alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    difference = scale = 0.0
    for part in (examples, examples[:1]):
        own = student(part)
        (said,) = session.run(None, {"input": part.numpy()})
        difference = max(difference, float((torch.from_numpy(said) - own).abs().max()))
        scale = max(scale, float(own.abs().max()))
    if not difference <= TOLERANCE * max(scale, 1.0):
        raise GuardError(
            f"the ONNX file answers otherwise than the student, by up to {difference:.2g} in logits up to "
            f"{scale:.2g}: it was not kept; use the student's safetensors"
        )
    return Checked(name, difference, scale, len(examples))


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter talks about its own inner deprecations: nothing there that a user can mend."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
