"""limbeck from Python: run a recipe, resume a run, distil plain modules, demonstrate."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from limbeck import config, plain
from limbeck.config import Recipe
from limbeck.contracts import Net
from limbeck.engine.ranks import alone, here, together
from limbeck.engine.run import Run, claim
from limbeck.engine.shards import keep_whole
from limbeck.engine.state import (
    file_hash,
    read_json,
    variable_state,
    write_folder,
    write_json,
    write_sealed,
    write_text,
)
from limbeck.errors import CheckpointError, ConfigError, ServiceError
from limbeck.nets.backbones import read_weights
from limbeck.nets.taps import core
from limbeck.report.card import write_card
from limbeck.report.page import PAGE, write_page
from limbeck.report.run import read_run

RUNS = Path("runs")


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        folder: the run's folder.
        data: the content of ``result.json``.
    """

    folder: Path
    data: dict[str, Any]


@together()
def run(
    recipe: str | Path | Recipe,
    sets: Sequence[str] = (),
    *,
    seed: int | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> Result:
    """Carry out a recipe.

    Args:
        recipe: a recipe's name, a YAML file, or a ``Recipe``.
        sets: overrides ``a.b=value``; not with a ``Recipe``.
        seed: the run's seed; None = the recipe's.
        out: the run's folder; None = ``runs/<name>-s<seed>``.
        quiet: show no progress, only warnings.

    Raises:
        LimbeckError: the recipe, the data, the networks or the folder will not do, found before training;
            or training went wrong, with the run resumable.
    """
    recipe = chosen(recipe, sets, seed)
    folder = folder_of(recipe, out)
    if any((folder / "checkpoints").glob("*.json")) or (folder / "result.json").exists():
        state = "a finished" if (folder / "result.json").exists() else "an unfinished"
        raise ConfigError(
            f"{folder} holds {state} run: name another folder with --out, delete it, "
            f"or go on with it by: limbeck resume {folder}"
        )
    recipe.scenario.check(recipe)
    return _carry_out(recipe, folder, resume=False, quiet=quiet)


def chosen(recipe: str | Path | Recipe, sets: Sequence[str], seed: int | None) -> Recipe:
    """The recipe that a caller means; see ``run``."""
    if not isinstance(recipe, Recipe):
        return config.load(recipe, sets, seed)
    if sets:
        raise ConfigError("sets change a recipe by name or file: give config.load(name, sets) for a Recipe")
    return recipe if seed is None else replace(recipe, seed=seed)


def folder_of(recipe: Recipe, out: str | Path | None) -> Path:
    """Where a run of ``recipe`` goes; see ``run``."""
    return Path(out) if out is not None else RUNS / f"{recipe.name}-s{recipe.seed}"


@together()
def resume(folder: str | Path, *, changed: bool = False, quiet: bool = False) -> Result:
    """Go on with a run that was cut off; a finished one gives its figures again.

    Args:
        folder: the run's.
        changed: go on though the recipe, the data or a frozen network is not what the run began with.
        quiet: show no progress, only warnings.

    Raises:
        LimbeckError: the folder holds no run, the recipe, the data or a frozen network is another than the
            run began with, or every checkpoint in it is damaged.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").exists():
        raise ConfigError(f"{folder} holds no run: there is no recipe.yaml in it; see limbeck run --help")
    if plain.read(folder / "recipe.yaml").get("made_by"):
        raise ConfigError(f"{folder} was made by limbeck.distill: call it again with resume=True")
    if known := read_result(folder):
        if here().first and not (folder / PAGE).exists():
            with closing(claim(folder)):
                write_card(folder)
                write_page(folder)
        return Result(folder, known)
    recipe = config.load(folder / "recipe.yaml")
    recipe.scenario.check(recipe)
    return _carry_out(recipe, folder, resume=True, changed=changed, quiet=quiet)


def read_result(folder: Path) -> dict[str, Any] | None:
    """The figures of a finished run; None where there are none, or they are damaged."""
    try:
        figures = read_json(folder / "result.json")
    except (OSError, ValueError, CheckpointError):
        return None
    whole = isinstance(figures, dict) and isinstance(figures.get("student"), dict)
    return figures if whole else None


def _carry_out(recipe: Recipe, folder: Path, *, resume: bool, quiet: bool, changed: bool = False) -> Result:
    try:
        with (
            recipe.engine.limited(),
            Run(folder, recipe.engine, recipe.seed, resume=resume, changed=changed, quiet=quiet) as session,
        ):
            if not resume and session.ranks.first:
                write_text(folder / "recipe.yaml", config.dump(recipe))
                write_json(folder / "versions.json", versions())
            session.agree("recipe.yaml", config.to_plain(recipe))
            return finish(folder, session, recipe.scenario.run(recipe, session), recipe)
    except ServiceError as error:
        raise ServiceError(f"{error}; its answers are kept: go on with limbeck resume {folder}") from error


def finish(folder: Path, session: Run, figures: dict[str, Any], recipe: Recipe | None = None) -> Result:
    """On the first rank alone, save the student, the figures, its card and the page, which is the last.

    Args:
        recipe: what was carried out; None where the networks were given from Python.
    """
    figures["time"] = {
        "seconds": round(session.total_seconds(), 3),
        "teacher_share": session.teacher_share(),
        "stages": {name: round(value, 3) for name, value in session.seconds.items()},
    }
    student = session.modules.get_submodule("student")
    keep_whole(student)
    if not session.ranks.first:
        return Result(folder, figures)
    figures["terms"] = read_run(folder).term_means()
    figures["versions"] = versions()
    names = (figures.get("student") or {}).get("class_names") or []
    shutil.rmtree(folder / "cache", ignore_errors=True)
    files = save_student(folder, student, _description(student, recipe, names))
    figures["files"] = {"recipe.yaml": file_hash(folder / "recipe.yaml")} | files
    write_sealed(folder / "result.json", figures)
    session.tracking.conclude(figures)
    write_card(folder)
    write_page(folder)
    return Result(folder, figures)


def save_student(folder: Path, student: torch.nn.Module, description: dict[str, Any]) -> dict[str, str]:
    """Write the student's learnt weights as ``student/model.safetensors``, and ``student/config.json``.

    Returns:
        The SHA-256 of each file by its path in ``folder``.

    A network of a library with a form of its own for that is written in it. A plain network keeps its
    own names, so that the folder of a timm network is loadable by ``timm.create_model("local-dir:...")``. A
    frozen backbone is left out: the recipe names it.
    """
    to = folder / "student"

    def write(place: Path) -> None:
        if isinstance(student, Net) and student.save(place):
            return
        network = core(student)
        state = variable_state(student) if network is student else network.state_dict()
        weights = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        save_file(weights, place / "model.safetensors")
        write_json(place / "config.json", description)

    write_folder(to, write)
    files = sorted(path for path in to.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def _description(student: torch.nn.Module, recipe: Recipe | None, names: Sequence[str]) -> dict[str, Any]:
    """What a reader of the weights needs to make the network again."""
    found = dict(getattr(student, "description", None) or {})
    if not found:
        found["network"] = type(core(student)).__name__
        if recipe is not None:
            form = recipe.student.input_spec()
            found |= {
                "student": config.plain_value(recipe.student, "student"),
                "images": {
                    "input_size": [form.channels, form.size, form.size],
                    "mean": list(form.mean), "std": list(form.std),
                },
            }  # fmt: skip
    return found | ({"num_classes": len(names), "label_names": list(names)} if names else {})


@dataclass(frozen=True)
class Export:
    """What ``export`` wrote.

    Attributes:
        folder: the student's folder.
        card: the model card.
        onnx: the ONNX file's name, size and sum, its largest difference from the student, the largest logit
            and the number of inputs compared; None where it was not asked for.
        int8: the same of the quantised file, with its figures on the test split beside those of the other;
            None where it was not asked for.
    """

    folder: Path
    card: Path
    onnx: dict[str, Any] | None
    int8: dict[str, Any] | None


def export(
    folder: str | Path,
    *,
    onnx: bool = False,
    int8: bool = False,
    student: torch.nn.Module | None = None,
    examples: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> Export:
    """Write the model card of a finished run anew and, on request, its student as ``student/model.onnx``.

    The ONNX file maps a float32 batch of any size, as the student reads it, to the logits that the student
    predicts with; that of a language model maps token ids [B, T], both free, to logits [B, T, V]. It is
    compared with the student on real test inputs before it is kept.

    Args:
        folder: the run's.
        onnx: write the ONNX file.
        int8: write it, and ``student/model.int8.onnx``, with weights of eight bits, measured on the test
            split.
        student: the module itself, where the run was made by ``distill``.
        examples: inputs [N, ...] that they are compared on; None = test inputs.
        labels: what is right [N] for ``examples``, so that accuracy is measured.

    Raises:
        LimbeckError: no finished run, a missing package, a network that ONNX cannot hold, or a file that
            answers otherwise than the student.
    """
    alone("limbeck export")
    folder = Path(folder)
    to = folder / "student"
    found: dict[str, dict[str, Any]] = {}
    _check_files(folder, read_result(folder) or {})
    if onnx or int8:
        from limbeck import exporting

        if student is not None and examples is None:
            raise ConfigError("examples is not given: a student from Python is compared on inputs of yours")
        network = exporting.answering(load_student(folder)) if student is None else student.eval()
        if examples is None:
            recipe = config.load(folder / "recipe.yaml")
            names = (read_result(folder) or {})["student"].get("class_names") or []
            examples, answers = exporting.test_inputs(recipe), exporting.test_answers(recipe, names)
        else:
            answers = iter([(examples, labels)])
        found["onnx"] = exporting.to_onnx(network, examples, to / "model.onnx").as_dict()
        write_json(to / "onnx.json", found["onnx"])
    if int8:
        found["int8"] = exporting.to_int8(to / "model.onnx", to / "model.int8.onnx", answers)
        write_json(to / "int8.json", found["int8"])
    return Export(to, write_card(folder), found.get("onnx"), found.get("int8"))


def _check_files(folder: Path, figures: dict[str, Any]) -> None:
    """Raise ``CheckpointError`` unless the student's files are what the run wrote."""
    for name, digest in figures.get("files", {}).items():
        if not (folder / name).is_file() or file_hash(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} is damaged: its content is not what the run wrote; to make it anew, delete "
                f"{folder / 'result.json'} and go on with: limbeck resume {folder}"
            )


def load_student(folder: str | Path) -> Any:
    """The trained student of a finished run, in evaluation mode.

    Its forward takes a ``Batch``; ``student.predict(student(batch))`` are the logits [B, C] in the order of
    the classes in ``result.json``.

    Raises:
        LimbeckError: no finished run, or a file of it that is not what the run wrote.
    """
    folder = Path(folder)
    figures = read_result(folder)
    if figures is None:
        where = f"finish it with: limbeck resume {folder}" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{folder} holds no finished run: {where}")
    if plain.read(folder / "recipe.yaml").get("made_by"):
        raise ConfigError(
            f"{folder} was made by limbeck.distill: load student/model.safetensors into your network yourself"
        )
    _check_files(folder, figures)
    recipe = config.load(folder / "recipe.yaml")
    opened = recipe.scenario.open_student(recipe, folder / "student", figures)
    if opened is not None:
        return opened
    classes = len(figures["student"]["class_names"])
    state = read_weights(folder / "student" / "model.safetensors")
    return recipe.scenario.load_student(recipe, state, classes)


def versions() -> dict[str, str]:
    """Versions of what figures depend on."""
    named = ("limbeck", "torch", "timm", "numpy", "safetensors")
    return {"python": platform.python_version(), "platform": sys.platform} | {
        name: importlib.metadata.version(name) for name in named
    }
