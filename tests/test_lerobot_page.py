"""``docs/lerobot.md`` does what it says, on a look-alike of SmolVLA; on the real one see tests/test_lerobot_real.py."""

import json
import re
import shlex
from pathlib import Path

import lerobot_page
import pytest
import torch
from tiny_lookalikes import observations, save

from vlaquant.cli import _parser
from vlaquant.linear import W4A16Linear


def test_the_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "my_policy", "smolvla")
    lerobot_page.prepare(tmp_path, [*observations(3), *observations(1, wrist=False)])
    monkeypatch.chdir(tmp_path)
    left = lerobot_page.run(2, observations(1, seed=3)[0])
    assert (left["action"].shape, left["chunk"].shape) == ((1, 4), (1, 8, 4))
    assert torch.isfinite(left["chunk"]).all()
    assert any(isinstance(module, W4A16Linear) for module in left["policy"].modules())
    config = json.loads(Path("my_policy_w4", "config.json").read_text(encoding="utf-8"))
    assert config["type"] == "vlaquant_smolvla"


def test_the_commands_and_recipes_of_the_page() -> None:
    lines = "".join(lerobot_page.blocks("bash"))
    commands = re.findall(r"^\S*/vlaquant (.*)$", lines, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["plan", "quantize", "inspect"]
    for command in commands:
        args = _parser().parse_args(shlex.split(command))
        assert (lerobot_page.ROOT / getattr(args, "config", "configs")).exists()
    named = set(re.findall(r"`(lerobot_\w+_(?:awq|gptq|smoothquant))`", lerobot_page.PAGE))
    assert named == {path.stem for path in (lerobot_page.ROOT / "configs").glob("lerobot_*.yaml")}
    makefile = (lerobot_page.ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^make ([\w-]+)", lines, flags=re.MULTILINE))
