"""Every command at a pipe: lines that fit, no colours, one JSON document on request, and a next command that works."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from staged import skip_verification, small_limits
from tiny import observations, openvla, save_observations, save_openvla

from vlaquant.cli import _parser, main
from vlaquant.plan import plan_from_dict
from vlaquant.sensitivity import Scan
from vlaquant.terminal import WIDTH

RECIPE = {
    "model": "policy",
    "rules": [{"part": part, "scheme": "w4a16", "group_size": 64} for part in ("language", "vision")],
    "calibration": {"kind": "episodes", "path": "episodes", "samples": 4, "min_tokens": 16},
    "quantizer": {"kind": "gptq"},
    "budget": {"candidates": ["w2a16", "w8a16"], "samples": 1},
}
#: Command -> a key of its document, and whether its summary has a figure of what got worse.
COMMANDS = {
    "plan --config recipe.yaml": "bytes_after",
    "plan --config recipe.yaml --layers": "bytes_after",
    "quantize --config recipe.yaml --output new --overwrite": "layers",
    "quantize --config recipe.yaml --output new --dry-run": "bytes_after",
    "qat --config recipe.yaml --output trained --overwrite --steps 2 --batch 1": "qat",
    "sensitivity --config scan.yaml": "groups",
    "inspect out": "plan",
    "inspect out --layers": "plan",
    "eval --model out --reference policy --episodes episodes": "kind",
    "bench --shapes 32x64 --tokens 1 --schemes w4a16 --group-size 32 --rounds 1": "rows",
    "bench out --reference policy --episodes episodes --rounds 1 --threads 1": "versions",
    "doctor": "kernels",
    "report out": "verdict",
    "report out --reference policy --episodes episodes": "weight_errors",
    "report --compare out other": "models",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float policy, recorded episodes, a recipe, and what it wrote."""
    folder = tmp_path_factory.mktemp("commands")
    save_openvla(folder / "policy", openvla())
    save_observations(folder / "episodes", "calibration", observations(4))
    save_observations(folder / "episodes", "evaluation", observations(4, seed=1))
    without = {key: value for key, value in RECIPE.items() if key != "budget"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(without), encoding="utf-8")
    (folder / "scan.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        skip_verification(patch)
        for name in ("out", "other"):
            assert main(["quantize", "--config", "recipe.yaml", "--output", name]) == 0
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    skip_verification(monkeypatch)
    small_limits(monkeypatch)
    monkeypatch.setattr("vlaquant.evaluate.evaluation.memory", lambda *_: None)  # two more processes, tested elsewhere
    return folder


def next_command(text: str) -> list[str]:
    """The words of the command that a summary ends with."""
    done, _, command = text.rpartition("\nnext   ")
    assert re.search(r"^done   \S", done, flags=re.MULTILINE), text
    assert re.search(r"^worse  \S", done, flags=re.MULTILINE), text
    return shlex.split(command.replace("\\\n", " "))


def check_next(words: list[str], folder: Path) -> None:
    """It is a command of ours whose directories are there, or one that opens the page."""
    if words[0] == "python3":
        assert words[1:3] == ["-m", "webbrowser"]
        assert (folder / words[3]).is_file()
        return
    assert words[0] == "vlaquant"
    given = vars(_parser().parse_args(words[1:]))
    for name in ("config", "model", "reference", "episodes", "directory"):
        if given.get(name) is not None:
            assert (folder / given[name]).exists(), words


@pytest.mark.parametrize("command", COMMANDS)
def test_text_for_people(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    lines = printed.out.splitlines()
    assert [line for line in lines if len(line) > WIDTH] == []
    assert len(lines) > 4
    check_next(next_command(printed.out), here)


@pytest.mark.parametrize("command", COMMANDS)
def test_one_document_for_programs(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out, parse_constant=pytest.fail)
    assert COMMANDS[command] in document
    check_next(next_command(printed.err), here)
    if "plan" in document and "layers" in document["plan"]:
        assert plan_from_dict(document["plan"]).quantized


def test_documents_are_those_of_the_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "--config", "scan.yaml", "--estimated", "--json", "scan.json"]) == 0
    assert "w2a16" in capsys.readouterr().out
    assert Scan.read(here / "scan.json").candidates == ("w2a16", "w8a16")
    assert main(["inspect", "out", "--json"]) == 0
    manifest = json.loads((here / "out" / "vlaquant.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == manifest


def test_figures_of_what_got_worse(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def worse(*arguments: str) -> str:
        assert main([*arguments]) == 0
        text = capsys.readouterr().out
        found = re.search(r"^worse  (.*?)\nnext ", text, flags=re.MULTILINE | re.DOTALL)
        assert found is not None
        return " ".join(found.group(1).split())

    manifest: Any = json.loads((here / "out" / "vlaquant.json").read_text(encoding="utf-8"))
    losses = {layer["name"]: layer["loss"] for layer in manifest["layers"] if layer["loss"] is not None}
    assert worse("inspect", "out").endswith(max(losses, key=lambda name: losses[name]))
    same = worse("eval", "--model", "policy", "--reference", "policy", "--episodes", "episodes")
    assert same == "actions differ by 0 on average; 0 % of the tokens differ"
    changed = worse("eval", "--model", "out", "--reference", "policy", "--episodes", "episodes")
    assert changed != same


def test_the_next_commands_lead_from_a_plan_to_the_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, seen = shlex.split("vlaquant plan --config recipe.yaml"), []
    while words[0] == "vlaquant":
        seen.append(words[1])
        assert len(seen) < 9, seen
        quick = ["--rounds", "1", "--threads", "1"] if words[1] == "bench" else []
        assert main([*words[1:], *quick]) == 0
        words = next_command(capsys.readouterr().out)
    check_next(words, here)
    assert seen == ["plan", "quantize", "eval", "report", "bench", "report"]
    page = (here / words[3]).read_text(encoding="utf-8")
    assert "was not measured" not in page
