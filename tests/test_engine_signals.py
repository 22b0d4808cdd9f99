"""The real command, interrupted in the middle: what it says, what it leaves, and how it goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from staged import GPTQ_TEXT, files_of, left_behind, make_source, skip_verification, stages_in

from vlaquant.cli import main

#: The command, slowed down: it waits after its first stage.
_SLOW = """
import signal, sys, time
import torch
# Tests that run in the background inherit that it is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
from vlaquant.cli import main
from vlaquant.engine.work import WorkDirectory
commit = WorkDirectory.commit
def slow(self, *args):
    commit(self, *args)
    print("finished", len(self.records), flush=True)
    time.sleep(120)
WorkDirectory.commit = slow
sys.exit(main(sys.argv[1:]))
"""


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
    with subprocess.Popen(
        [sys.executable, "-c", _SLOW, *arguments, "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "finished 1\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
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
