"""The model card of a run's student, written from the run's facts alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck import plain
from limbeck.engine.state import write_text
from limbeck.report import figures
from limbeck.report.figures import Figure, lookup
from limbeck.report.markdown import block, code, inline
from limbeck.report.run import Run, finished, read_run, understood

CARD = "README.md"
LONGEST = 20
"""So many classes are named."""

TRANSFORMERS = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained(".")',
    'tokenizer = AutoTokenizer.from_pretrained(".")',
    'text = tokenizer("The", return_tensors="pt").input_ids',
    "print(tokenizer.decode(model.generate(text, max_new_tokens=20)[0]))",
)


def write_card(run_dir: str | Path) -> Path:
    """Write ``student/README.md`` of a finished run.

    Raises:
        DataError: the folder is no run's, or its run has not finished.
    """
    run = read_run(run_dir)
    path = run.folder / "student" / CARD
    with understood(str(run.folder)):
        text = card(run)
    write_text(path, text)
    return path


def card(run: Run) -> str:
    """The card as Markdown, with the front matter that the Hugging Face hub reads."""
    result = finished(run)
    config = _read(run.folder / "student" / "config.json")
    onnx, int8 = (_read(run.folder / "student" / name) for name in ("onnx.json", "int8.json"))
    blocks = [
        "\n".join(_front(result, config)),
        f"# {inline(run.name)}",
        "\n".join(_opening(run, result)),
        "\n".join(["## Figures", "", *_figures(result)]),
        "\n".join(["## Protocol", "", *_protocol(result)]),
        "\n".join(["## Data", "", *_data(result, config)]),
        "\n".join(["## Teacher", "", *_teacher(run, result)]),
        "\n".join(["## How to load it", "", *_loading(run, result, config)]),
        *(["\n".join(["## As ONNX", "", *_onnx(result, onnx, int8)])] if onnx else []),
        "\n".join(["## Limits", "", *_limits(run, result)]),
        "\n".join(["## How it was made", "", *_making(run, result)]),
    ]
    return "\n\n".join(blocks) + "\n"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = plain.from_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _front(result: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    yield "---"
    if figures.of_text(result):
        yield from ("library_name: transformers", "pipeline_tag: text-generation", "metrics: [perplexity]")
    else:
        if "architecture" in config:
            yield "library_name: timm"
        yield from ("pipeline_tag: image-classification", "metrics: [accuracy]")
    yield "license: other"
    yield from ("tags: [limbeck, knowledge-distillation]", "---")


def _opening(run: Run, result: Mapping[str, Any]) -> Iterator[str]:
    words = str(run.recipe.get("description") or "")
    if words:
        yield inline(words)
    what = _named(run.recipe.get("student"))
    scenario, data, seed = (inline(result.get(name)) for name in ("scenario", "data", "seed"))
    yield f"The student ({code(what)}) of a knowledge distillation by limbeck: scenario {scenario},"
    yield f"data {data}, seed {seed}."


def _named(choice: Any) -> str:
    """A choice of the recipe in a few words."""
    if not isinstance(choice, Mapping):
        return str(choice)
    network = choice.get("network")
    told = choice.get("model") or choice.get("backbone") or choice.get("target")
    inside = f" {_named(network)}" if network else f" {told}" if told else ""
    return f"{choice.get('name')}{inside}"


def _figures(result: Mapping[str, Any]) -> Iterator[str]:
    rows = figures.figures_of(result)
    if not rows:
        yield "Nothing was measured: the run had no test data."
        return
    yield "| | student | 95 % interval | teacher |"
    yield "| --- | ---: | --- | ---: |"
    yield from (_row(figure, result) for figure in rows)
    yield ""
    for figure in rows:
        if not figure.path.startswith("cost."):
            yield f"- {figure.label}: {figure.meaning}"


def _row(figure: Figure, result: Mapping[str, Any]) -> str:
    other = figures.of_teacher(figure).of(result)
    return (
        f"| {inline(figure.label)} | {figure.text(figure.of(result))} | {figure.interval(result)} | "
        f"{'' if other is None else figure.text(other)} |"
    )


def _protocol(result: Mapping[str, Any]) -> Iterator[str]:
    for name, text in figures.protocol_lines(result.get("protocol") or {}):
        yield f"- {inline(name)}: {inline(text)}"


def _data(result: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    yield f"- {inline(result.get('data'))}"
    licence = result.get("data_licence") or "not known"
    yield f"- licence of the data, as its source states it: {inline(licence)}"
    if result.get("data_source"):
        yield f"- source: {inline(result['data_source'])}"
    names = [inline(name) for name in config.get("label_names") or []]
    if names:
        more = f" ... ({len(names)} in all)" if len(names) > LONGEST else ""
        yield f"- classes, in the order of the logits: {', '.join(names[:LONGEST])}{more}"


def _teacher(run: Run, result: Mapping[str, Any]) -> Iterator[str]:
    if result.get("teacher") is None and not _taught(run):
        yield "None: the student learnt from the labels alone."
        return
    yield f"- {code(_named(run.recipe.get('teacher')))}"
    how = lookup(result, "protocol.teacher")
    if isinstance(how, Mapping):
        told = (f"{name} {value}" for name, value in how.items())
        yield f"- trained on labels in the same run: {inline(', '.join(told))}"
    named = run.recipe.get("objective") or []
    yield f"- what was matched: {inline(', '.join(_objective(one) for one in named))}"


def _taught(run: Run) -> bool:
    teacher = run.recipe.get("teacher")
    name = teacher.get("name") if isinstance(teacher, Mapping) else teacher
    return name not in (None, "none")


def _objective(choice: Any) -> str:
    if not isinstance(choice, Mapping):
        return str(choice)
    shown = {key: value for key, value in choice.items() if key in ("weight", "temperature")}
    fields = ", ".join(f"{key} {value}" for key, value in shown.items())
    return f"{choice.get('name')}{f' ({fields})' if fields else ''}"


def _loading(run: Run, result: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    if figures.of_text(result):
        yield from _loading_text(run)
        return
    form = _form(config)
    if form:
        (channels, height, width), mean, std = form["input_size"], form["mean"], form["std"]
        pixels = ", ".join(map(inline, (channels, height, width)))
        yield f"It reads images [B, {pixels}]: values in 0..1, minus {code(mean)}, over {code(std)}."
        yield ""
    if "architecture" in config:
        yield from ("With timm, from this folder:", "", "```python", "import timm", "")
        yield 'model = timm.create_model("local-dir:student", pretrained=True).eval()'
        yield from ("```", "")
    if run.recipe.get("made_by"):
        yield "The network was given from Python: make it again and load `model.safetensors` into it:"
        yield from ("", "```python", "from safetensors.torch import load_file", "")
        yield from ('network.load_state_dict(load_file("model.safetensors"))', "```")
        return
    yield from ("With limbeck, from the run's folder:", "", "```python", "import limbeck", "")
    yield f"student = limbeck.load_student({json.dumps(run.folder.name)})"
    yield "logits = student.predict(student(batch))  # batch: limbeck.contracts.Batch"
    yield "```"
    backbone = (config.get("student") or {}).get("backbone")
    if backbone:
        yield ""
        yield "`model.safetensors` holds what was learnt: prompts and heads. The frozen backbone"
        yield f"`{backbone}` is taken by its name, so it must be there. timm loads that backbone, but knows"
        yield "no prompts, so timm alone cannot give these answers; the file that `limbeck export RUN --onnx`"
        yield "writes holds all of it."


def _onnx(result: Mapping[str, Any], onnx: Mapping[str, Any], int8: Mapping[str, Any]) -> Iterator[str]:
    given = "input_ids" if figures.of_text(result) else "input"
    what = "token ids [B, T], int64" if figures.of_text(result) else "images, float32, any batch size"
    yield from ("```python", "import onnxruntime", "")
    yield f'session = onnxruntime.InferenceSession("{onnx["file"]}")'
    yield f'(logits,) = session.run(None, {{"{given}": inputs}})  # {what}'
    yield from ("```", "", *(f"- {line}" for line in export_lines(Path(), onnx, int8)))
    if figures.of_text(result):
        yield "- a row is one document; what pads it stands behind its tokens"


def export_lines(
    folder: Path, onnx: Mapping[str, Any] | None, int8: Mapping[str, Any] | None
) -> Iterator[str]:
    """What ``limbeck export`` says of its ONNX files, a line each."""
    if onnx:
        close = f"largest difference from the student {onnx['difference']:.1e} in logits up to "
        close += f"{onnx['largest_logit']:.1f}, on {onnx['samples']} test inputs"
        yield f"onnx: {folder / onnx['file']}, {_size(onnx['bytes'])}, {close}"
    if int8:
        told = f"agrees with it on {int8['agreement']:.1f} % of {int8['samples']} answers"
        for name, unit, digits in (("accuracy", " %", 1), ("perplexity", "", 3)):
            if name in int8.get("float", {}):
                before, after = int8["float"][name], int8["int8"][name]
                told += f", {name} {after:.{digits}f}{unit} against {before:.{digits}f}{unit}"
        yield f"int8: {folder / int8['file']}, {_size(int8['bytes'])}, {told}"


def _size(count: float) -> str:
    return f"{figures.count(count)}B"


def _loading_text(run: Run) -> Iterator[str]:
    yield from ("With transformers, from the folder that holds this file:", "", "```python", *TRANSFORMERS)
    yield from ("```", "", "With limbeck, from the run's folder:", "", "```python", "import limbeck", "")
    name = json.dumps(run.folder.name)
    yield f"student = limbeck.load_student({name})  # student.network is that of transformers"
    yield "```"


def _form(config: Mapping[str, Any]) -> Mapping[str, Any]:
    form: Mapping[str, Any] = config.get("pretrained_cfg") or config.get("images") or {}
    return form


def _limits(run: Run, result: Mapping[str, Any]) -> Iterator[str]:
    what = "texts" if figures.of_text(result) else "images"
    data = inline(result.get("data"))
    yield f"- The figures are of the test split of {data} and say nothing about other {what}."
    yield "- They are of one seed; the interval is that of the test sample, not of seeds."
    if _taught(run):
        yield "- A student can take over its teacher's mistakes: agreement counts right and wrong answers."
    classes = lookup(result, "student.class_names") or []
    if classes:
        yield f"- It knows {len(classes)} classes and names one of them for any image."
    if figures.of_text(result):
        yield "- What it writes was not judged: it may be false, unkind, or word for word of its texts."
        if result.get("exposure") is None:
            yield "- How well it remembers single texts was not measured."
    yield "- Nothing was measured under shift, noise or attack, or for groups of people."
    if _pretrained(run.recipe):
        named = code(_named(run.recipe.get("student")))
        yield f"- It starts from weights of {named}: their licence holds too."


def _pretrained(recipe: Mapping[str, Any]) -> bool:
    """Whether the student starts from weights that somebody else trained."""
    student = recipe.get("student")
    if not isinstance(student, Mapping):
        return False
    return bool(student.get("pretrained", student.get("name") == "causal_lm") or student.get("backbone"))


def _making(run: Run, result: Mapping[str, Any]) -> Iterator[str]:
    if not run.recipe.get("made_by"):
        yield from ("`recipe.yaml` beside this folder has every setting; the run can be made again by", "")
        yield from ("```", "limbeck run recipe.yaml", "```", "")
    seconds = lookup(result, "time.seconds")
    if seconds is not None:
        yield f"It took {figures.duration(float(seconds))}."
    versions = ", ".join(f"{name} {value}" for name, value in (result.get("versions") or {}).items())
    yield f"Versions: {inline(versions)}."
    yield from ("", *block(plain.write(_short(run.recipe)).rstrip(), "yaml"))


def _short(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of the recipe, without the machine's settings."""
    kept = ("made_by", "teacher", "student", "objective", "selector", "scenario", "data", "views", "seed")
    return {name: recipe[name] for name in kept if name in recipe}
