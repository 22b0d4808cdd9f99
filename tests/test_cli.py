"""The command as a user meets it: exit codes, messages, and nothing written when something is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import llama, observations, openvla, save_llama, save_observations, save_openvla

from vlaquant.cli import main


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory in fresh processes has a test of its own."""
    monkeypatch.setattr("vlaquant.evaluate.evaluation.memory", lambda *_: None)


RULES = [{"part": "language", "scheme": "w4a16", "group_size": 64}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "source", llama())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("What action should the robot take to push ? " * 60, encoding="utf-8")
    return path


def recipe(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"rules": RULES, **changes}), encoding="utf-8")
    return str(path)


def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], code: int = 1) -> str:
    """Run, and see the exit code, one message without a traceback, and no output directory. Returns the message."""
    assert main(["quantize", "--output", str(tmp_path / "out"), *arguments]) == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    _, start, message = printed.partition("vlaquant: error: ")
    assert start
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    return message


def test_quantize_inspect_and_eval(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = {"kind": "text", "path": str(text), "samples": 4, "sequence_length": 32}
    config = recipe(tmp_path, quantizer={"kind": "gptq"}, calibration=calibration, model="source", output="out")
    assert main(["quantize", "--config", config]) == 0
    printed = capsys.readouterr().out
    assert "verified in a fresh process: " in printed
    assert f"written: {tmp_path / 'out'}" in printed
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "quantizer   gptq" in capsys.readouterr().out
    arguments = ["--model", str(tmp_path / "out"), "--reference", str(source), "--text", str(text)]
    assert (
        main(["eval", *arguments, "--samples", "2", "--sequence-length", "32", "--json", str(tmp_path / "r.json")]) == 0
    )
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert (tmp_path / "r.json").is_file()


def test_eval_of_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = save_observations(tmp_path / "episodes", "evaluation", observations(4))
    paths = [str(save_openvla(tmp_path / f"policy{seed}", openvla(seed=seed))) for seed in range(2)]
    arguments = ["--model", paths[0], "--episodes", str(episodes), "--json", str(tmp_path / "r.json")]
    assert main(["eval", *arguments, "--reference", paths[1], "--samples", "3"]) == 0
    assert re.search(r"observations +3 +3 ", capsys.readouterr().out)
    different = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["actions"]
    assert different["token_agreement"]["value"] < 1.0 < different["bin_distance"]["value"]
    assert main(["eval", *arguments, "--reference", paths[0]]) == 0
    assert "100.0%" in capsys.readouterr().out
    same = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["actions"]
    assert (same["token_agreement"]["value"], same["whole_chunk"]["l1"]["value"], same["observations"]) == (1.0, 0.0, 4)


def test_eval_in_a_simulator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnasium")
    episodes = save_observations(tmp_path / "episodes", "evaluation", observations(2))
    paths = [str(save_openvla(tmp_path / f"policy{seed}", openvla(seed=seed))) for seed in range(2)]
    arguments = ["--model", paths[0], "--reference", paths[1], "--episodes", str(episodes), "--rollouts", "2"]
    gym = ["--env", "gymnasium:made_gym:Reach-v0", "--env-option", "image=views.top", "--workers", "0"]
    kept = ["--json", str(tmp_path / "r.json"), "--videos", str(tmp_path / "seen" / "videos")]
    assert main(["eval", *arguments, *gym, *kept, "--max-steps", "4"]) == 0
    assert "McNemar" in capsys.readouterr().out
    rollouts = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rollouts"]
    assert (rollouts["environment"], rollouts["max_steps"]) == ("gymnasium:made_gym:Reach-v0", 4)
    assert rollouts["videos"] == "seen/videos"
    assert [pair["seed"] for pair in rollouts["episodes"]] == [91_000, 91_001]
    for wrong, message in (
        (["--env", "nowhere"], "unknown simulator 'nowhere'"),
        (["--videos", "v"], "--videos goes with --json"),
        (["--env-option", "x=1"], "metaworld has no options"),
    ):
        assert main(["eval", *arguments, "--workers", "0", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_eval_refuses_a_language_model_as_a_policy(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    episodes = save_observations(tmp_path / "episodes", "evaluation", observations(1))
    assert main(["eval", "--model", str(source), "--reference", str(source), "--episodes", str(episodes)]) == 1
    assert "compare language models with --text" in capsys.readouterr().err


def test_interruption(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlaquant.commands.plan", interrupted)
    assert main(["plan", "--config", recipe(tmp_path), "--model", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "vlaquant: interrupted; no output was written\n"


def test_dry_run_and_plan_write_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path)
    assert (
        main(["quantize", "--config", config, "--model", str(source), "--output", str(tmp_path / "o"), "--dry-run"])
        == 0
    )
    first = capsys.readouterr().out
    assert main(["plan", "--config", config, "--model", str(source)]) == 0
    assert capsys.readouterr().out == first
    assert main(["plan", "--config", config, "--model", str(source), "--layers"]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("arguments", [[], ["quantise"], ["quantize"], ["eval", "--model", "x"], ["inspect"]])
def test_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_no_model_or_output_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "--config", recipe(tmp_path)]) == 2
    assert "--model DIR" in capsys.readouterr().err
    assert main(["quantize", "--config", recipe(tmp_path), "--model", str(source)]) == 2
    assert "--output DIR" in capsys.readouterr().err


def test_missing_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such directory" in fails(
        capsys, tmp_path, ["--config", recipe(tmp_path), "--model", str(tmp_path / "no")]
    )


def _poison(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]), "truncated"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickled weights"),
        (_poison, "NaN or infinite"),
    ],
    ids=["no config", "truncated", "pickle", "nan weights"],
)
def test_bad_models(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    change(source)
    assert message in fails(capsys, tmp_path, ["--config", recipe(tmp_path), "--model", str(source)])


def test_nan_activations(source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(source / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"].fill_(3e37)
    save_file(tensors, source / "model.safetensors")
    calibration = {"kind": "text", "path": str(text), "samples": 4, "sequence_length": 32}
    config = recipe(tmp_path, quantizer={"kind": "gptq"}, calibration=calibration)
    message = fails(capsys, tmp_path, ["--config", config, "--model", str(source)])
    assert "model.layers.0.mlp.down_proj" in message
    assert "NaN or Inf in sample 0" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantiser": {"kind": "rtn"}}, "did you mean 'quantizer'?"),
        ({"rules": [{"part": "language", "scheme": "w4a61"}]}, "unknown scheme 'w4a61'"),
        ({"quantizer": {"kind": "gptq"}}, "calibration: missing"),
    ],
    ids=["unknown key", "unknown scheme", "no data"],
)
def test_bad_recipes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert message in fails(capsys, tmp_path, ["--config", recipe(tmp_path, **changes), "--model", str(source)], code=2)


def test_a_rule_that_matches_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, rules=[{"part": "vision", "scheme": "w8a8"}])
    assert "matches none of the 15 Linear layers" in fails(
        capsys, tmp_path, ["--config", config, "--model", str(source)]
    )


def test_group_that_does_not_divide(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, rules=[{"part": "language", "scheme": "w4a16", "group_size": 48}])
    message = fails(capsys, tmp_path, ["--config", config, "--model", str(source)])
    assert "in_features=64 is not a multiple of group_size=48; legal group sizes here: 16, 32, 64" in message


@pytest.mark.parametrize("content", ["", "push"])
def test_empty_calibration_text(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "empty.txt").write_text(content, encoding="utf-8")
    config = recipe(tmp_path, quantizer={"kind": "gptq"}, calibration={"kind": "text", "path": "empty.txt"})
    assert "fewer than sequence_length" in fails(capsys, tmp_path, ["--config", config, "--model", str(source)])


def test_output_that_is_not_empty(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x", encoding="utf-8")
    arguments = ["quantize", "--config", recipe(tmp_path), "--model", str(source), "--output", str(out)]
    assert main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_to_a_full_device(*_: object, **__: object) -> None:
        Path("/dev/full").write_bytes(b"0" * 10**6)

    monkeypatch.setattr("vlaquant.checkpoint.tensor_writing._header", save_to_a_full_device)
    message = fails(capsys, tmp_path, ["--config", recipe(tmp_path), "--model", str(source)])
    assert "No space left on device" in message


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "inspect", str(tmp_path / "no")]) == 1
    assert "Traceback" in capsys.readouterr().err
