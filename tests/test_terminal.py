"""What is written for people: tables that fit, colours only where they are wanted, one bar at a time."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaquant.terminal import (
    STDOUT,
    WIDTH,
    Closing,
    Outcome,
    bar,
    command_text,
    document_text,
    finish,
    format_table,
    quiet_stdout,
    say,
    shortened,
)

OUTCOME = Outcome(
    "part  MiB\n----  ---\nall   1.5\n" + "note: " + "word " * 40,
    {"kind": "test", "values": [1.5, float("nan"), float("inf")]},
    Closing(
        "some work was done", "everything by 3 %, " + "and more " * 20, ("vlaquant", "plan", "--config", "a b.yaml")
    ),
)
words = st.text("abcdefghijklmnop._", min_size=1, max_size=60)
figures = st.floats(-1e9, 1e9).map(lambda value: f"{value:,.3g}")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def names(count: int) -> list[str]:
    towers = ("vision_backbone.featurizer", "vision_backbone.fused_featurizer", "language_model.model")
    return [f"{tower}.blocks.{i}.self_attn.{x}_proj" for tower in towers for i in range(count) for x in "qkvo"]


@given(st.lists(st.tuples(words, figures, figures, st.lists(words, max_size=30).map(" ".join)), min_size=1, max_size=8))
def test_a_table_fits_and_loses_no_figure_and_no_word(rows: list[tuple[str, str, str, str]]) -> None:
    text = format_table([("name", "before", "after", "why"), *rows])
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    for name, before, after, why in rows:
        assert re.search(rf"(?<!\S){re.escape(before)} +{re.escape(after)}(?!\S)", text)
        assert len(name) > 40 or name in text
        assert all(len(word) > 20 or word in text for word in why.split())


def test_columns_of_figures_are_aligned_to_the_right() -> None:
    rows = [("layer", "MiB", "scheme"), ("a", "1,234.50", "w4a16"), ("b", "0.5", "float"), ("c", "", "-")]
    assert format_table(rows).splitlines() == [
        "layer       MiB  scheme",
        "-----  --------  ------",
        "a      1,234.50  w4a16",
        "b           0.5  float",
        "c                -",
    ]


def test_figures_are_never_cut() -> None:
    wide = tuple(f"{10**i:,}.25" for i in range(9, 19))
    line = format_table([tuple("abcdefghij"), wide]).splitlines()[-1]
    assert line.split() == list(wide)
    assert len(line) > WIDTH


def test_a_row_of_one_cell_goes_across() -> None:
    rows = [("name", "bytes"), ("vision: a reason that is longer than every cell",), ("a", "12"), ("b" * 3, "4")]
    assert format_table(rows).splitlines()[2:] == [
        "vision: a reason that is longer than every cell",
        "a        12",
        "bbb       4",
    ]


@pytest.mark.parametrize("length", [40, 46, 60])
def test_names_lose_their_middles_and_stay_distinct(length: int) -> None:
    known = names(30)
    short = shortened(known, length)
    assert max(map(len, short.values())) <= length
    assert len(set(short.values())) == len(known)
    for name, cut in short.items():
        head, _, tail = cut.partition("…")
        assert name.startswith(head)
        assert name.endswith(tail)
    assert shortened(["short", "x" * 200], 100)["short"] == "short"


def test_a_fixed_cut_would_make_names_alike() -> None:
    """Why the place of the cut is searched for."""
    known = names(2)
    assert len({f"{name[:13]}…{name[-26:]}" for name in known}) < len(known)
    assert len(set(shortened(known, 40).values())) == len(known)


@pytest.mark.parametrize(
    ("stream", "environment", "wanted"),
    [
        (Terminal(), {}, "colours"),
        (Terminal(), {"NO_COLOR": "1"}, "none"),
        (Terminal(), {"NO_COLOR": ""}, "colours"),
        (Terminal(), {"TERM": "dumb"}, "none"),
        (io.StringIO(), {}, "none"),
    ],
    ids=["terminal", "NO_COLOR", "empty NO_COLOR", "dumb terminal", "pipe"],
)
def test_colours(
    stream: io.StringIO, environment: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"NO_COLOR": None, "TERM": "xterm"} | environment).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream)
    finish(OUTCOME, None)
    text, coloured = stream.getvalue(), wanted == "colours"
    assert ("\x1b[" in text) == coloured
    plain = re.sub(r"\x1b\[\d+m", "", text)
    assert "part  MiB\n----  ---\nall   1.5\n" in plain
    assert max(map(len, plain.splitlines())) <= WIDTH
    if coloured:
        assert "\x1b[1mpart  MiB\x1b[0m" in text  # a heading
        assert "\x1b[1mall" not in text


def test_the_end_of_a_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    finish(OUTCOME, tmp_path / "deep" / "r.json")
    printed = capsys.readouterr()
    assert printed.err == ""
    done, *worse, following = printed.out.split("\n\n")[-1].strip().splitlines()
    assert done == "done   some work was done"
    assert worse[0].startswith("worse  everything by 3 %, and more")
    assert all(line.startswith("       ") for line in worse[1:])
    assert following == "next   vlaquant plan --config 'a b.yaml'"
    kept = (tmp_path / "deep" / "r.json").read_text(encoding="utf-8")
    assert json.loads(kept) == {"kind": "test", "values": [1.5, None, None]}


def test_a_document_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_stdout(STDOUT):
        sys.stdout.write("a library has something to say\n")
    finish(OUTCOME, STDOUT)
    printed = capsys.readouterr()
    assert printed.out == document_text(OUTCOME.document)
    assert "a library has something to say\n" in printed.err
    assert "next   vlaquant plan" in printed.err
    with quiet_stdout(None):
        sys.stdout.write("seen\n")
    assert capsys.readouterr().out == "seen\n"


@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=9))
def test_commands_can_be_copied(arguments: list[str]) -> None:
    command = ["vlaquant", *arguments]
    assert shlex.split(command_text(command).replace(" \\\n", " ")) == command


def test_long_commands_go_on_at_an_option() -> None:
    command = ["vlaquant", "eval", *(word for i in range(6) for word in (f"--option-{i}", f"directory/number/{i}"))]
    lines = command_text(command).splitlines()
    assert len(lines) > 1
    assert max(map(len, ["next   " + lines[0], *lines[1:]])) <= WIDTH
    assert all(line.strip().startswith("--") for line in lines[1:])
    assert all(line.endswith(" \\") for line in lines[:-1])


@pytest.mark.parametrize(
    ("called", "found", "expected"),
    [
        ("/usr/bin/vlaquant", "/usr/bin/vlaquant", "vlaquant plan"),
        (".venv/bin/vlaquant", None, ".venv/bin/vlaquant plan"),
        ("x/vlaquant/__main__.py", None, f"{Path(sys.executable).name} -m vlaquant plan"),
    ],
)
def test_the_next_command_is_called_as_this_one(
    called: str, found: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr("vlaquant.terminal.shutil.which", lambda _: found)
    finish(OUTCOME, None)
    assert f"next   {expected}" in capsys.readouterr().out


def test_one_bar_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in bar([1], "outer"):
        inner = bar([1], "inner")
        assert inner.disable
        assert list(inner) == [1]
        say("a line between")
    after = bar([1], "after")
    assert not after.disable
    after.close()
    assert bar([1], "silent", show=False).disable
    text = stream.getvalue()
    assert "outer" in text
    assert "inner" not in text
    assert "a line between\n" in text


def test_bars_are_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bar(range(3), "quiet")) == [0, 1, 2]
    with bar(total=2, label="quiet") as shown:
        shown.update()
    assert capsys.readouterr() == ("", "")
