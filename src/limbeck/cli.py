"""The command line. Each command calls ``limbeck.api`` or a report; nothing is computed here.

Imports stand inside the commands, so that ``limbeck --help`` needs neither torch nor pydantic.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter

from limbeck.errors import LimbeckError, shown

if TYPE_CHECKING:
    from rich.console import RenderableType

    from limbeck.api import Result

Json = Annotated[bool, Parameter(name="--json", negative=())]
Sets = Annotated[tuple[str, ...], Parameter(name="--set", negative=())]


app = App(
    name="limbeck",
    help="Knowledge distillation: from any teacher into any student, on one data set or a stream of\n"
    "tasks.\n\n"
    "Start with: limbeck list, then: limbeck run cdl-kdp. With --debug an error shows its traceback.",
    help_format="plaintext",
)


@app.command
def run(
    recipe: str,
    /,
    *,
    sets: Sets = (),
    seed: int | None = None,
    out: Path | None = None,
    as_json: Json = False,
) -> None:
    """Carry out a recipe.

    Args:
        recipe: A name that `limbeck list recipes` shows, or a .yaml file.
        sets: Override a field: path.to.field=value; may be repeated.
        seed: Replace the recipe's seed.
        out: Folder of the run; runs/NAME-sSEED by default.
        as_json: Print the result as JSON.
    """
    from limbeck import api

    _finish(api.run(recipe, sets, seed=seed, out=out, quiet=as_json), as_json)


@app.command
def plan(
    recipe: str,
    /,
    *,
    sets: Sets = (),
    seed: int | None = None,
    out: Path | None = None,
    as_json: Json = False,
) -> None:
    """Foresee what a recipe will take: stages, steps, memory, caches, time. A short probe; nothing is kept.

    Args:
        recipe: A name that `limbeck list recipes` shows, or a .yaml file.
        sets: Override a field: path.to.field=value; may be repeated.
        seed: Replace the recipe's seed.
        out: Folder where the run would go, whose neighbour `.cache` is looked into.
        as_json: Print the plan as JSON.
    """
    from limbeck.planning import plan as foresee

    found = foresee(recipe, sets, seed=seed, out=out)
    _print(found.data, found.text, as_json)


@app.command
def resume(
    run: Path, /, *, changed: Annotated[bool, Parameter(negative=())] = False, as_json: Json = False
) -> None:
    """Go on with a run that was stopped.

    Args:
        run: The run's folder.
        changed: Go on though the recipe, the data or a frozen network was changed since the run began.
        as_json: Print the result as JSON.
    """
    from limbeck import api

    _finish(api.resume(run, changed=changed, quiet=as_json), as_json)


@app.command(name="list")
def list_(kind: str | None = None, /, *, as_json: Json = False) -> None:
    """Name the recipes and the choices.

    Args:
        kind: recipes, teachers, students, objectives, selectors, scenarios, prompts or data; all by default.
        as_json: Print them as JSON.
    """
    from limbeck import catalogue

    listed = catalogue.listing(kind)
    _print(listed, catalogue.listing_text(listed), as_json)


@app.command
def show(name: str, /, *, as_json: Json = False) -> None:
    """Say what a recipe or a choice is, with its fields and their values.

    Args:
        name: A recipe or its .yaml file, a choice (dkd; students/prompted_vit for one kind), views or engine.
        as_json: Print it as JSON.
    """
    from limbeck import catalogue

    entries = catalogue.entries(name)
    _print(entries, catalogue.entries_text(entries), as_json)


@app.command
def compare(
    runs: Annotated[tuple[Path, ...], Parameter(negative=())],
    /,
    *,
    baseline: str | None = None,
    plot: Path | None = None,
    mixed: Annotated[bool, Parameter(negative=())] = False,
    as_json: Json = False,
) -> None:
    """Tabulate runs: mean and spread over seeds, differences from a baseline.

    Args:
        runs: Folders of finished runs.
        baseline: The method that others are set against, seed by seed.
        plot: Draw the comparison into this .png, .svg or .pdf file.
        mixed: Allow runs on different data or streams.
        as_json: Print the table as JSON.
    """
    from limbeck.report.compare import compare as set_side_by_side

    compared = set_side_by_side(runs, baseline=baseline, mixed=mixed)
    if plot is not None:
        compared.plot(plot)
    _print(compared.data, compared.text, as_json)


@app.command
def study(
    runs: Annotated[tuple[Path, ...], Parameter(negative=())],
    /,
    *,
    baseline: str,
    figure: str = "student.accuracy",
    as_json: Json = False,
) -> None:
    """Test what students of many sizes gain from a teacher, and what the gain goes with.

    Args:
        runs: Folders of finished runs, of the baseline and of distilled students, paired by size and seed.
        baseline: The recipe of the students that learnt without a teacher.
        figure: What is gained: a dotted path in result.json, where more is better.
        as_json: Print the tests as JSON.
    """
    from limbeck.report.study import study as test

    found = test(runs, baseline=baseline, figure=figure)
    _print(found.data, found.text, as_json)


@app.command
def report(run: Path, /, *, as_json: Json = False) -> None:
    """Write a run's report page anew.

    Args:
        run: The run's folder, finished or not.
        as_json: Print the page's path as JSON.
    """
    from limbeck.report.page import write_page

    page = write_page(run)
    _print({"report": str(page)}, f"report: {page}", as_json)


@app.command
def export(
    run: Path,
    /,
    *,
    onnx: Annotated[bool, Parameter(negative=())] = False,
    int8: Annotated[bool, Parameter(negative=())] = False,
    as_json: Json = False,
) -> None:
    """Write the model card of a run's student anew and, on request, the student as ONNX.

    Args:
        run: The folder of a finished run.
        onnx: Write student/model.onnx, compared with the student on test inputs.
        int8: Write student/model.int8.onnx too, with weights of eight bits, measured on the test split.
        as_json: Print what was written as JSON.
    """
    from limbeck import api
    from limbeck.report.card import export_lines

    written = api.export(run, onnx=onnx, int8=int8)
    lines = [f"weights: {written.folder / 'model.safetensors'}", f"card: {written.card}"]
    lines += export_lines(written.folder, written.onnx, written.int8)
    said = {"folder": str(written.folder), "card": str(written.card)}
    _print({**said, "onnx": written.onnx, "int8": written.int8}, "\n".join(lines), as_json)


@app.command
def demonstrate(
    recipes: Annotated[tuple[str, ...], Parameter(negative=())],
    /,
    *,
    seeds: int = 3,
    sets: Sets = (),
    label: str = "",
    jobs: int = 1,
    as_json: Json = False,
) -> None:
    """Run recipes over several seeds and write down what was seen.

    Args:
        recipes: Names that `limbeck list recipes` shows.
        seeds: How many seeds, counted from 0.
        sets: Override a field of every recipe: path.to.field=value; may be repeated.
        label: Added to the names of files and runs, to keep changed settings apart.
        jobs: Runs at a time.
        as_json: Print what was seen as JSON.
    """
    from limbeck.demonstration import demonstrate as run_all

    seen = run_all(recipes, seeds=seeds, sets=sets, label=label, jobs=jobs)
    _print(seen.data, seen.text, as_json)


@app.command
def arena(
    recipe: str = "kd-cnn",
    /,
    *,
    methods: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    seeds: int = 3,
    sets: Sets = (),
    label: str = "",
    jobs: int = 1,
    runs: Path = Path("runs/arenas"),
    out: Path = Path("arenas"),
    as_json: Json = False,
) -> None:
    """Rank methods: one teacher, one student, one data set, one budget, several seeds.

    Args:
        recipe: Gives teacher, student, data and budget; its scenario is static.
        methods: Objectives, or recipes whose objectives are taken; may be repeated. All objectives by
            default; the labels alone (ce) and kd always take part.
        seeds: How many seeds, counted from 0.
        sets: Override a field of the recipe: path.to.field=value; may be repeated.
        label: Added to the arena's name, to keep changed settings apart.
        jobs: Runs at a time.
        runs: Folder of the runs; finished ones are kept, cut-off ones resumed.
        out: Folder of the page and the JSON file.
        as_json: Print what was found as JSON.
    """
    from limbeck.tournament import arena as compete

    found = compete(
        recipe,
        methods=methods,
        seeds=seeds,
        sets=sets,
        label=label,
        jobs=jobs,
        runs=runs,
        out=out,
        quiet=as_json,
    )
    _print(found.data, found, as_json)


@app.command
def pretrain(name: str, /, *, as_json: Json = False) -> None:
    """Make the weights of a shipped backbone anew.

    Args:
        name: limbeck-glyphs-m or limbeck-glyphs-s.
        as_json: Print the result as JSON.
    """
    from limbeck.pretraining import pretrain as make

    _finish(make(name, quiet=as_json), as_json)


@app.command
def doctor(*, as_json: Json = False) -> None:
    """Say what is installed, what is missing, and what this machine can do.

    Args:
        as_json: Print it as JSON.
    """
    from limbeck import doctor as examination

    found = examination.examine()
    _print(found, examination.text(found), as_json)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 something the user can mend; resumable: 75 where a server does not
    answer or a rank is gone, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        app([a for a in given if a != "--debug"], exit_on_error=False, print_error=False)
    except (LimbeckError, CycloptsError) as error:
        if debug:
            raise
        _fail(str(error), error.code if isinstance(error, LimbeckError) else 2)
    except OSError as error:
        if debug:
            raise
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"limbeck: {shown(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


def _finish(result: Result, as_json: bool) -> None:
    from rich.console import Group

    from limbeck.engine.ranks import here
    from limbeck.report.summary import summary

    if not here().first:
        return
    page = result.folder / "report.html"
    said = {"folder": str(result.folder), **result.data}
    _print(said, Group(summary(result.data), "", f"report: {page}"), as_json)


def _print(data: object, text: RenderableType, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(data, indent=2, default=str))
    else:
        from limbeck.terminal import Terminal

        Terminal(highlight=False, soft_wrap=False).print(text, markup=False)
