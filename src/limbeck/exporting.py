"""A student as an ONNX file, checked against the student itself, and that file in eight bits."""

from __future__ import annotations

import logging
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.config import Recipe
from limbeck.contracts import Batch, Net
from limbeck.data.batches import Batches
from limbeck.data.tokens import UNCOUNTED, Rows
from limbeck.engine.state import file_hash, write_atomically
from limbeck.errors import ConfigError, DataError, GuardError
from limbeck.nets.causal_lm import CausalLM
from limbeck.scenarios.fit_together import inputs, load_data
from limbeck.scenarios.language import Tokens, evenly

NEEDED = ("onnx", "onnxruntime", "onnxscript")
CHECKED = 256
"""So many test images are compared."""
CHECKED_ROWS = 8
"""So many test texts are: each of their tokens has logits of the whole vocabulary."""
TOLERANCE = 1e-3
"""Largest difference of the logits, as a share of the largest logit, that passes for rounding."""
LARGEST = 2**31 - 2**20
"""Bytes of weights that one ONNX file holds, with some room for the graph."""

Labelled = tuple[Tensor, Tensor | None]


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
        return described(self.file) | {
            "difference": self.difference, "largest_logit": self.scale, "samples": self.samples,
        }  # fmt: skip


def described(file: Path) -> dict[str, Any]:
    """What tells a file from others."""
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": file_hash(file)}


class Answer(nn.Module):
    """What a student answers: images [B, C, H, W] as it reads them to logits [B, classes]."""

    def __init__(self, student: Net) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        """The logits that the student predicts with, of both its heads where it has two."""
        none = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device)
        return self.student.predict(self.student(Batch(inputs=images, labels=none, index=none, view=none)))


class Continuation(nn.Module):
    """What a language model answers: token ids [B, T] of one document a row to logits [B, T, V]."""

    def __init__(self, student: CausalLM) -> None:
        super().__init__()
        self.network = student.network

    def forward(self, input_ids: Tensor) -> Tensor:
        """The logits of what follows each token."""
        logits: Tensor = self.network(input_ids=input_ids, use_cache=False).logits
        return logits


def answering(student: Net) -> nn.Module:
    """``student`` as a function of one tensor."""
    return Continuation(student) if isinstance(student, CausalLM) else Answer(student)


def test_inputs(recipe: Recipe, count: int | None = None) -> Tensor:
    """The first test inputs of a recipe's data, as its student reads them: images [count, C, H, W], or token
    ids [count, T]; None = ``CHECKED`` images, ``CHECKED_ROWS`` texts."""
    if recipe.student.reads_text():
        return Tokens(recipe).test.ids[: count or CHECKED_ROWS]
    return next(iter(_test_images(recipe, count or CHECKED).epoch(0))).inputs


def test_answers(recipe: Recipe, classes: Sequence[str]) -> Iterator[Labelled]:
    """All test inputs of a recipe's data with what is right: images [B, C, H, W] with their places [B] among
    ``classes``, or documents of token ids [1, T] with the next tokens [1, T] or ``UNCOUNTED``."""
    if recipe.student.reads_text():
        rows = Tokens(recipe).test
        yield from documents(rows, evenly(getattr(recipe.scenario, "eval_rows", None), len(rows)))
        return
    images = _test_images(recipe, CHECKED)
    place = torch.tensor([list(classes).index(name) for name in images.images.classes])
    for batch in images.epoch(0):
        yield batch.inputs, place[batch.labels]


def documents(rows: Rows, index: Tensor) -> Iterator[Labelled]:
    """Each document of the rows ``index`` by itself, up to its last token that counts."""
    for row in index.tolist():
        ids, said = rows.ids[row], rows.following[row]
        parts = torch.zeros_like(ids) if rows.segments is None else rows.segments[row]
        for number in torch.unique(parts).tolist():
            own = (parts == number).nonzero().flatten()
            counted = (said[own] != UNCOUNTED).nonzero().flatten()
            if len(counted):
                own = own[: int(counted[-1]) + 1]
                yield ids[own][None], said[own][None]


def _test_images(recipe: Recipe, size: int) -> Batches:
    form = inputs(recipe)
    return Batches(
        load_data(recipe).test, batch_size=size, shuffle=False,
        size=form.size, channels=form.channels, mean=form.mean, std=form.std,
    )  # fmt: skip


def to_onnx(student: nn.Module, examples: Tensor, path: Path) -> Checked:
    """Write a module that maps images to logits as ONNX, with a free batch axis, and check the file.

    That of a language model (``Continuation``) has a free length, too.

    Args:
        student: in evaluation mode.
        examples: real inputs [N, ...], N >= 2, that both are asked.
        path: the file; one that stood there is replaced once the check has passed.

    Raises:
        ConfigError: a package of the extra ``export`` is missing, or the network cannot be written as ONNX.
        DataError: fewer than two inputs.
        GuardError: the file answers otherwise than the student.
    """
    _check_packages()
    if len(examples) < 2:
        raise DataError(f"{len(examples)} input: ONNX is checked with batches of two sizes, give at least 2")
    size = sum(p.numel() * p.element_size() for p in student.parameters())
    if size > LARGEST:
        raise ConfigError(
            f"the student has {size / 2**30:.1f} GiB of weights but one ONNX file holds 2: load student/ "
            "with its own library"
        )
    with TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        _write(student, examples[:2], made)
        difference, scale = _check(student, examples, made)
        write_atomically(path, partial(_copy, made))
    return Checked(path, difference, scale, len(examples))


def to_int8(file: Path, path: Path, answers: Iterable[Labelled]) -> dict[str, Any]:
    """Write an ONNX file's network with weights of eight bits, and say what that costs.

    onnxruntime's dynamic quantisation: weights are whole numbers, activations become such as they come.

    Args:
        file: what ``to_onnx`` wrote.
        path: the new file; one that stood there is replaced once the new one has answered.
        answers: inputs, and what is right: class numbers [B], or next tokens [B, T] with ``UNCOUNTED``; None
            where it is not known.

    Returns:
        The file's name, ``bytes`` and ``sha256``, and ``compared``.

    Raises:
        ConfigError: a package of the extra ``export`` is missing, or the file cannot be quantised.
        GuardError: its answers are no numbers.
    """
    _check_packages()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        try:
            with _silent():
                quantize_dynamic(file, made, weight_type=QuantType.QInt8)
            found = compared(file, made, answers)
        except GuardError:
            raise
        except Exception as error:  # of several packages and many families
            raise ConfigError(f"{file} cannot be quantised ({_cause(error)}): use it as it is") from error
        write_atomically(path, partial(_copy, made))
    return described(path) | {"float_bytes": file.stat().st_size} | found


def compared(file: Path, quantised: Path, answers: Iterable[Labelled]) -> dict[str, Any]:
    """What a quantised network says against what it was before.

    Returns:
        ``samples`` (images, or tokens that count), ``agreement`` in percent and the largest ``difference`` of
        a logit; where it is known what is right, ``float`` and ``int8``, each with ``accuracy`` in percent,
        ``nll`` in nats, and of texts ``perplexity``.
    """
    sessions = [_session(file), _session(quantised)]
    right, nll, same, count, difference, text = [0, 0], [0.0, 0.0], 0, 0, 0.0, False
    known = True
    for given, labels in answers:
        said = [_asked(session, given) for session in sessions]
        text = said[0].ndim == 3
        if labels is not None:
            counts = labels.flatten() != UNCOUNTED
            said, wanted = [each.flatten(0, -2)[counts] for each in said], labels.flatten()[counts]
            for one, each in enumerate(said):
                right[one] += int((each.argmax(1) == wanted).sum())
                nll[one] += float(F.cross_entropy(each.double(), wanted, reduction="sum"))
        known = known and labels is not None
        if not said[1].isfinite().all():
            raise GuardError(
                "the quantised file's answers are no numbers: it was not kept; use the float one"
            )
        same += int((said[0].argmax(-1) == said[1].argmax(-1)).sum())
        count += said[0][..., 0].numel()
        difference = max(difference, float((said[0] - said[1]).abs().max()))
    if not count:
        raise DataError("0 inputs: a quantised network is compared on at least 1")
    found: dict[str, Any] = {"samples": count, "agreement": 100 * same / count, "difference": difference}
    for one, name in enumerate(("float", "int8") if known else ()):
        found[name] = {"accuracy": 100 * right[one] / count, "nll": nll[one] / count}
        found[name] |= {"perplexity": math.exp(nll[one] / count)} if text else {}
    return found


def _check_packages() -> None:
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        raise ConfigError(
            f"ONNX needs {', '.join(lacking)}, not installed here: pip install 'limbeck[export]'"
        )


def _copy(made: Path, to: Path) -> None:
    shutil.copyfile(made, to)


def _form(student: nn.Module) -> tuple[str, Mapping[int, Any]]:
    """The input's name, and its free axes."""
    if not isinstance(student, Continuation):
        return "input", {0: torch.export.Dim("batch")}
    network: Any = student.network
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    return "input_ids", {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest)}


def _write(student: nn.Module, example: Tensor, to: Path) -> None:
    name, free = _form(student)
    other = "load student/ with transformers" if name == "input_ids" else "use its safetensors"
    try:
        with _silent():
            program = torch.export.export(student, (example,), dynamic_shapes=(free,), strict=False)
            torch.onnx.export(
                program, (), to, dynamo=True, external_data=False, input_names=[name],
                output_names=["logits"],
            )  # fmt: skip
    except Exception as error:  # of several packages and many families
        raise ConfigError(f"this student cannot be written as ONNX ({_cause(error)}): {other}") from error


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@torch.no_grad()
def _check(student: nn.Module, examples: Tensor, file: Path) -> tuple[float, float]:
    """Ask both, all inputs at once, the first alone, and of a text its first half; the largest difference of
    a logit, and the largest logit."""
    session = _session(file)
    difference = scale = 0.0
    parts = [examples, examples[:1]]
    if isinstance(student, Continuation):
        parts = [*torch.split(examples, 1), examples[:2, : examples.shape[1] // 2]]
    for part in parts:
        own, said = student(part), _asked(session, part)
        difference = max(difference, float((said - own).abs().max()))
        scale = max(scale, float(own.abs().max()))
    if not difference <= TOLERANCE * max(scale, 1.0):
        raise GuardError(
            f"the ONNX file answers otherwise than the student, by up to {difference:.2g} in logits up to "
            f"{scale:.2g}: it was not kept; use the student's safetensors"
        )
    return difference, scale


def _session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _asked(session: Any, given: Tensor) -> Tensor:
    """The logits of a file."""
    (said,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    return torch.from_numpy(said)


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
