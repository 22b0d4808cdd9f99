"""The real command, interrupted in the middle: what it says, what it leaves, and how it goes on."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import signalled
from staged import GPTQ_TEXT, files_of, left_behind, make_source, skip_verification, stages_in

from vlaquant.cli import main
from vlaquant.engine.work import WorkDirectory


def slow_command(ready: Any, arguments: list[str]) -> int:
    """The command, slowed down: it waits after its first stage."""
    commit = WorkDirectory.commit

    def slow(self: WorkDirectory, *args: Any) -> None:
        commit(self, *args)
        ready.set()
        time.sleep(120)

    WorkDirectory.commit = slow  # type: ignore[assignment, method-assign]
    return main(arguments)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of ``vlaquant quantize``, all but the output."""
    source = make_source(tmp_path / "source", "llama")
    text = tmp_path / "text.txt"
    text.write_text("What action should the robot take to push ? " * 60, encoding="utf-8")
    recipe: dict[str, Any] = GPTQ_TEXT | {"model": str(source)}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ["quantize", "--config", str(config)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(
    tmp_path: Path,
    arguments: list[str],
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    ended = signalled(number, slow_command, [*arguments, "--output", str(output)])
    said = ended.err
    assert ended.code == 130, said
    assert "Traceback" not in said
    assert "vlaquant: interrupted; no output was written" in said
    assert "1 finished stages are kept in" in said
    assert "go on with --resume" in said
    assert not output.exists()
    assert stages_in(output) == 1
    skip_verification(monkeypatch)
    assert main([*arguments, "--output", str(output)]) == 1
    assert "go on with it (--resume), or throw it away (--overwrite)" in capsys.readouterr().err
    assert main([*arguments, "--output", str(output), "--resume"]) == 0
    assert "1 of 3 stages were finished before" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    assert files_of(output) == files_of(tmp_path / "whole")
    assert left_behind(output) == []
