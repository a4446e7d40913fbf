from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from limbeck import api, cli, plain, registry
from limbeck.errors import Interrupted

COMMANDS = (
    "run", "plan", "resume", "list", "show", "compare", "report", "export", "demonstrate", "arena",
    "pretrain", "doctor",
)  # fmt: skip


def call(*arguments: str) -> int:
    """Run a command in this process; its exit code."""
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def said_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert call(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("limbeck: ")
    assert err.count("\n") == 1
    return err


# Starting fast


def test_help_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys\nfrom limbeck.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'pydantic', 'numpy', 'yaml'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_help_starts_in_a_blink() -> None:
    """The bound is 0.3 s; what is counted is processor time, so that a busy machine does not fail it."""
    spent = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "limbeck", "--help"], capture_output=True, check=True)
        after = os.times()
        spent.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert statistics.median(spent) < 0.5


def test_listing_needs_no_torch() -> None:
    code = "import sys; from limbeck.cli import main; main(['list']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


# Listing and showing


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    listed = said_json(capsys, "list")
    assert set(listed) == set(registry.kinds())
    assert "cdl-kdp" in listed["recipes"]
    assert all(line for lines in listed.values() for line in lines.values())
    assert said_json(capsys, "list", "objectives") == {"objectives": listed["objectives"]}
    assert call("list", "objectives") == 0
    assert "dkd" in capsys.readouterr().out


def test_show_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = said_json(capsys, "show", "labels")
    assert entry["kind"] == "objectives"
    assert {"name": "smoothing", "type": "float", "default": "0.0"} in entry["fields"]
    assert "Source:" in entry["doc"]
    assert call("show", "labels") == 0
    assert "smoothing" in capsys.readouterr().out


def test_show_what_two_kinds_share(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {entry["kind"] for entry in said_json(capsys, "show", "prompted-vit")}
    assert kinds == {"teachers", "students"}
    (entry,) = said_json(capsys, "show", "students/prompted_vit")
    assert entry["kind"] == "students"


def test_show_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: kd\nseed: 7\n")
    (entry,) = said_json(capsys, "show", str(path))
    assert (entry["name"], entry["recipe"]["seed"]) == ("mine", 7)


def test_show_a_recipe_fills_in_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = said_json(capsys, "show", "cdl-kdp")
    assert entry["recipe"]["student"]["kd_prompts"]["length"] == 6
    assert call("show", "cdl-kdp") == 0
    assert re.search(r"kd_prompts: \{length: 6", capsys.readouterr().out)


def test_what_show_says_of_a_recipe_is_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = said_json(capsys, "show", "dfpt-kd")
    assert call("show", "dfpt-kd") == 0
    out = capsys.readouterr().out
    assert plain.parse(out[out.index("name: dfpt-kd") :], "show") == entry["recipe"]


def test_show_tells_of_what_fields_hold(capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = said_json(capsys, "show", "scenarios/continual")
    assert any(f["name"] == "lr" for inner in entry["inner"] for f in inner["fields"])
    (entry,) = said_json(capsys, "show", "students/prompted_vit")
    assert {"kd_prompts", "prompt_map"} <= {inner["name"] for inner in entry["inner"]}
    assert call("show", "students/prompted_vit") == 0
    assert "kd_prompts (fields)" in capsys.readouterr().out


@pytest.mark.parametrize("section", ["views", "engine"])
def test_show_a_section(capsys: pytest.CaptureFixture[str], section: str) -> None:
    (entry,) = said_json(capsys, "show", section)
    assert entry["kind"] == "section"
    assert entry["fields"]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    found = said_json(capsys, "doctor")
    assert found["packages"]["torch"]
    assert {"language", "graph", "diffusion", "federated", "search", "track", "export"} <= set(
        found["extras"]
    )
    assert found["machine"]["cores"] >= 1
    assert call("doctor") == 0
    assert "pip install 'limbeck[" in capsys.readouterr().out


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], r"Unknown command \"rnu\"\. Did you mean \"run\"\?"),
        (["run"], r"RECIPE requires an argument"),
        (["run", "cdl-kdp", "--sed", "3"], r"Unknown option: --sed\. Did you mean --seed\?"),
        (["run", "cdl-kdp", "--seed", "three"], r"three.*int"),
        (["run", "cdl-kpd"], r"unknown recipe 'cdl-kpd': did you mean 'cdl-kd'|unknown recipe 'cdl-kpd'"),
        (["run", "gone.yaml"], r"there is no file gone\.yaml"),
        (["run", "cdl-kdp", "--set", "scenario.epoch=3"], r"unknown field 'epoch' at scenario: .*'epochs'\?"),
        (["run", "cdl-kdp", "--set", "scenario.epochs"], r"must be written path\.to\.field=value"),
        (["show", "dkdd"], r"unknown recipe or choice 'dkdd': did you mean 'dkd'\?"),
        (["show", "objective/dkd"], r"unknown kind 'objective': did you mean 'objectives'\?"),
        (["list", "objectves"], r"unknown kind 'objectves': did you mean 'objectives'\?"),
        (["resume", "nowhere"], r"nowhere holds no run"),
    ],
)
def test_a_wrong_command_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert re.search(message, refused(capsys, *arguments))


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "limbeck", "--debug", "show", "dkdd"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_folder_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr(api, "run", full)
    assert refused(capsys, "run", "cdl-kdp") == "limbeck: runs/x: No space left on device\n"


def test_an_interrupted_run_exits_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise Interrupted("stopped; continue with: limbeck resume runs/x")

    monkeypatch.setattr(api, "run", interrupted)
    assert call("run", "cdl-kdp") == 130
    assert "limbeck resume runs/x" in capsys.readouterr().err


# What is handed on


def test_plan_prints_what_it_foresees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from limbeck.engine import probe

    monkeypatch.setattr(probe, "FIRST_SECONDS", 0.0)
    given = ("plan", "kd", "--out", str(tmp_path / "run"), "--set", "scenario.epochs=7")
    found = said_json(capsys, *given)
    assert [(stage["name"], stage["count"]) for stage in found["stages"]][1] == ("train", 7 * 2)
    assert call(*given, "--set", "engine.shard=both") == 0
    out, _ = capsys.readouterr()
    assert "shared out" in out and "this is of one" in out
    assert re.search(r"^train +14 ", out, re.MULTILINE)
    assert "parameters, teacher" in out and "resident at most" in out
    assert not list(tmp_path.iterdir())


def test_run_hands_its_arguments_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def run(recipe: str, sets: tuple[str, ...], **more: Any) -> api.Result:
        asked.update(recipe=recipe, sets=sets, **more)
        return api.Result(tmp_path, {"recipe": "cdl-kdp", "student": {"accuracy": 90.0}})

    monkeypatch.setattr(api, "run", run)
    said = said_json(
        capsys, "run", "cdl-kdp", "--set", "seed=1", "--set", "a.b=-2", "--seed", "3", "--out", str(tmp_path)
    )
    assert said["student"] == {"accuracy": 90.0}
    assert asked == {
        "recipe": "cdl-kdp",
        "sets": ("seed=1", "a.b=-2"),
        "seed": 3,
        "out": tmp_path,
        "quiet": True,
    }
    assert call("run", "cdl-kdp") == 0
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out.replace("\n", "")
    assert asked["quiet"] is False
