"""Several processes give what one gives, and none of them waits for ever for one that failed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import Ended, together
from safetensors.torch import load_file, save_file
from staged import (
    differing,
    files_of,
    in_memory,
    left_behind,
    make_source,
    recipe_for,
    samples_for,
    skip_verification,
    stages_in,
    streamed,
)
from tiny import observations, save_observations

from vlaquant.calibrate.statistics import RunningStats, merge, no_stats, row_keys
from vlaquant.cli import main
from vlaquant.engine.loop import StageLoop
from vlaquant.engine.processes import ALONE, Processes
from vlaquant.engine.stage import transform_stage_
from vlaquant.errors import CalibrationError, ExportError, VlaquantError

ROOT = Path(__file__).resolve().parent.parent

#: Llama has three samples, of 24 tokens each: of two processes one has two, and the other too few tokens by itself.
CASES = [
    ("llama", "gptq", "w4a16"),
    ("llama", "awq + gptq", "w4a16"),
    ("llama", "smoothquant", "w8a8"),
    ("llama tied", "gptq", "w8a8 static"),
    ("llama", "rtn mse", "w8a8"),
    ("llama", "awq + gptaq", "w4a16"),
    ("openvla", "gptq", "w4a16"),
    ("openvla", "gptaq", "w8a8"),
]
CASE = ("llama", "gptq", "w4a16")

#: Enough tokens for each of three processes.
MANY = [torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("slow") is None:
        skip_verification(monkeypatch)


def run_case(source: Path, case: tuple[str, str, str], output: Path, *, resume: bool = False, count: int = 8) -> None:
    """What all processes do."""
    kind, quantizer, scheme = case
    samples = None if quantizer.startswith("rtn") else samples_for(kind)[:count]
    with pytest.MonkeyPatch.context() as patched:
        skip_verification(patched)
        result = streamed(source, recipe_for(kind, quantizer, scheme), samples, output, resume=resume)
    assert result.manifest["complete"], "every process knows the manifest"
    sys.stdout.write(f"{[record.name for record in result.layers]}\n")


def succeeded(ended: list[Ended]) -> None:
    assert [one.code for one in ended] == [0] * len(ended), "\n".join(one.err for one in ended)


def same_directory(left: Path, right: Path) -> bool:
    found, other = files_of(left), files_of(right)
    return found.keys() == other.keys() and all(found[name] == other[name] for name in found)


def all_cases(sources: Path, outputs: Path) -> None:
    for number, case in enumerate(CASES):
        run_case(sources / case[0], case, outputs / str(number))


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    for kind in {kind for kind, _, _ in CASES}:
        make_source(tmp_path / kind, kind)
    ended = together(tmp_path / "log", 2, all_cases, tmp_path, tmp_path / "two")
    succeeded(ended)
    assert ended[0].out == ended[1].out, "records are in the same order in every process"
    all_cases(tmp_path, tmp_path / "one")
    for number, case in enumerate(CASES):
        one, two = tmp_path / "one" / str(number), tmp_path / "two" / str(number)
        assert same_directory(one, two), case
        assert left_behind(two) == []


def run_unmerged(source: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Processes, "merge", lambda _self, _names, running, _device: dict(running))
        run_in_memory(source, folder)


def test_the_comparison_notices_statistics_of_a_part_of_the_samples(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    succeeded(together(tmp_path / "log", 2, run_unmerged, source, tmp_path))
    wanted = in_memory(source, recipe_for(*CASE), MANY)
    assert differing(wanted, load_file(tmp_path / "0.safetensors")) != []


def run_in_memory(source: Path, folder: Path) -> None:
    save_file(in_memory(source, recipe_for(*CASE), MANY), folder / f"{os.environ['RANK']}.safetensors")


def test_a_model_in_memory_is_the_same_in_every_process(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    succeeded(together(tmp_path / "log", 3, run_in_memory, source, tmp_path))
    wanted = in_memory(source, recipe_for(*CASE), MANY)
    for rank in range(3):
        assert differing(wanted, load_file(tmp_path / f"{rank}.safetensors")) == []


def stopped_at_stage_1(source: Path, output: Path, victim: int, stop: Callable[[], None]) -> None:
    solve = StageLoop._solve

    def solve_or_stop(loop: StageLoop, works: Any) -> Any:
        assert loop._work is not None
        if len(loop._work.records) == 1 and loop._processes.rank == victim:
            stop()
        return solve(loop, works)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StageLoop, "_solve", solve_or_stop)
        run_case(source, CASE, output)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise CalibrationError("the data is bad")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("stop", [die, fail])
def test_if_one_stops_all_stop_and_go_on_together(tmp_path: Path, victim: int, stop: Callable[[], None]) -> None:
    source, output = make_source(tmp_path / "source", "llama"), tmp_path / "out"
    ended = together(tmp_path / "log", 2, stopped_at_stage_1, source, output, victim, stop)
    assert ended[victim].code == (-signal.SIGKILL if stop is die else 1)
    assert ended[1 - victim].code == 1
    assert "VlaquantError: another process of this run failed or died" in ended[1 - victim].err
    assert "1 finished stages are kept" in ended[1 - victim].err
    assert not output.exists()
    assert stages_in(output) == 1

    with pytest.raises(ExportError, match="processes: 1 now, 2 then"):
        run_case(source, CASE, output, resume=True)
    succeeded(together(tmp_path / "log", 2, resume_case, source, output))
    run_case(source, CASE, tmp_path / "one")
    assert same_directory(tmp_path / "one", output)
    assert left_behind(output) == []


def resume_case(source: Path, output: Path) -> None:
    assert stages_in(output) == 1
    run_case(source, CASE, output, resume=True)


def fail_at_once(source: Path, output: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        if os.environ["RANK"] == "1":
            patched.setattr(StageLoop, "_observe", lambda *_: fail())
        run_case(source, CASE, output)


def test_nothing_is_left_if_no_stage_was_finished(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    ended = together(tmp_path / "log", 2, fail_at_once, source, tmp_path / "out")
    assert [one.code for one in ended] == [1, 1]
    assert "another process of this run failed" in ended[0].err
    assert "the data is bad" in ended[1].err
    assert left_behind(tmp_path / "out") == []


def different_samples(source: Path, output: Path) -> None:
    samples = samples_for("llama")
    if os.environ["RANK"] == "1":
        samples = samples[::-1]
    streamed(source, recipe_for(*CASE), samples, output)


def refusals(source: Path, output: Path) -> None:
    with pytest.raises(CalibrationError, match="1 samples for 2 processes"):
        run_case(source, CASE, output, count=1)
    # Every refusal closes the connections, and the next run makes new ones
    recipe = recipe_for(*CASE, calibration={"kind": "text", "path": "unused", "min_tokens": 500})
    with pytest.raises(CalibrationError, match=r"layers saw fewer than 500 tokens: \S+ \(72\)"):
        streamed(source, recipe, samples_for("llama"), output)
    with pytest.raises(CalibrationError, match="processes 0 and 1 were not given the same: they differ in samples"):
        different_samples(source, output)
    run_case(source, CASE, output)


def choose_differently(source: Path, output: Path) -> None:
    def other(*args: Any, **more: Any) -> Any:
        return tuple(replace(record, kept=not record.kept) for record in transform_stage_(*args, **more))

    with pytest.MonkeyPatch.context() as patched:
        if os.environ["RANK"] == "1":
            patched.setattr("vlaquant.engine.loop.transform_stage_", other)
        with pytest.raises(VlaquantError, match=r"model\.layers\.0: the processes chose different scales"):
            run_case(source, ("llama", "awq + gptq", "w4a16"), output)


def test_processes_that_choose_different_scales_are_stopped(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    succeeded(together(tmp_path / "log", 2, choose_differently, source, tmp_path / "out"))


def test_refusals(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    succeeded(together(tmp_path / "log", 2, refusals, source, tmp_path / "out"))


#: Which layers read what: in sample s layer n reads the tokens number READ[n][s]; None reads nothing.
READ: dict[str, list[int | None]] = {
    "a": [0, 1, 2, 3, 4],
    "a too": [0, 1, 2, 3, 4],
    "other in sample 1": [0, 7, 2, 3, 4],
    "other in sample 2": [0, 1, 8, 3, 4],
    "once": [None, None, 2, None, None],
    "once too": [None, None, 2, None, None],
    "never": [None] * 5,
}


def seen_by(rank: int, size: int, *, paired: bool = False) -> dict[str, RunningStats]:
    """Sums of the samples of one process, one object for layers that share."""
    made: dict[tuple[int | None, ...], RunningStats] = {}
    found = {}
    for name, reads in READ.items():
        mine = tuple(reads[rank::size])
        if mine not in made:
            made[mine] = no_stats(300, hessian=True, sample_rows=16, device=torch.device("cpu"), paired=paired)
            for sample in range(rank, len(reads), size):
                if (number := reads[sample]) is not None:
                    width = 600 if paired else 300
                    rows = torch.randn(5 + number, width, generator=torch.Generator().manual_seed(number))
                    made[mine].add_(rows, row_keys(len(rows), seed=0, sample=sample, call=0))
        if any(number is not None for number in mine):
            found[name] = made[mine]
    return found


def merge_and_compare(_folder: Path, *, paired: bool) -> None:
    with Processes.current() as processes:
        mine = seen_by(processes.rank, processes.size, paired=paired)
        merged = processes.merge(list(READ), mine, torch.device("cpu"))
        wanted = seen_by(0, 1, paired=paired)
        assert list(merged) == list(wanted) == [name for name in READ if name != "never"]
        for name in wanted:
            one, all_ = wanted[name], merged[name]
            shares = {other for other in wanted if wanted[other] is one}
            assert {other for other in merged if merged[other] is all_} == shares, name
            assert (all_.tokens, all_.paired, len(all_.strips)) == (one.tokens, paired, len(one.strips))
            for field in ("keys", "sample", "channel_low", "channel_high"):
                assert torch.equal(getattr(all_, field), getattr(one, field)), (name, field)
            torch.testing.assert_close(all_.abs_sum, one.abs_sum, rtol=1e-14, atol=1e-14)
            for i, strip in enumerate(one.strips):
                torch.testing.assert_close(all_.strips[i], strip, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("size", "paired"), [(2, False), (3, False), (3, True)])
def test_merged_statistics_are_those_of_one_process(tmp_path: Path, size: int, paired) -> None:
    succeeded(together(tmp_path / "log", size, partial(merge_and_compare, paired=paired), tmp_path))


def test_what_two_processes_saw_of_one_layer_can_be_added_by_hand() -> None:
    parts = [seen_by(rank, 2)["other in sample 1"] for rank in range(2)]
    assert merge(*parts).tokens == seen_by(0, 1)["other in sample 1"].tokens, "the samples are split as wanted"


def exchange(_folder: Path) -> None:
    with Processes.current() as processes:
        rank = processes.rank
        value = {"rank": rank, "text": "é" * rank, "loss": 0.1 + rank, "nothing": None}
        assert processes.gather(value) == [
            {"rank": other, "text": "é" * other, "loss": 0.1 + other, "nothing": None} for other in range(3)
        ]
        assert processes.from_main(f"rank {rank}") == "rank 0"
        for dtype in (torch.int8, torch.int32, torch.int64, torch.float32, torch.bfloat16):
            tensor = torch.full((2, 3), rank, dtype=dtype)
            processes.broadcast_([tensor], 1)
            assert torch.equal(tensor, torch.full((2, 3), 1, dtype=dtype))
        assert Processes.current() is processes, "connected once"


def test_what_travels_arrives(tmp_path: Path) -> None:
    succeeded(together(tmp_path / "log", 3, exchange, tmp_path))


def test_shares() -> None:
    assert Processes(1, 3).share([1.0, 10.0, 2.0, 6.0, 5.0]) == [1, 0, 2, 1, 2]
    assert ALONE.share([3.0, 1.0]) == [0, 0]
    assert [list(Processes(rank, 2).positions(5)) for rank in range(2)] == [[0, 2, 4], [1, 3]]


def test_a_single_process_knows_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Processes.current() is ALONE
    assert not torch.distributed.is_initialized()
    assert ALONE.gather({1: (2,)}) == [{1: (2,)}], "the value itself"


def test_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(VlaquantError, match="4 processes on several machines"):
        Processes.current()


def command_line(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        skip_verification(patched)
        sys.exit(main(arguments))


def test_the_command_prints_once(tmp_path: Path) -> None:
    source, recipe = make_source(tmp_path / "source", "llama"), tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for("llama", "rtn", "w8a8")), encoding="utf-8")
    arguments = ["quantize", "--config", str(recipe), "--model", str(source), "--output", str(tmp_path / "out")]
    ended = together(tmp_path / "log", 2, command_line, arguments)
    succeeded(ended)
    assert "written:" in ended[0].out
    assert ended[1].out == ""
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["out.log.jsonl"]
    events = [json.loads(line) for line in (tmp_path / "out.log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({event["name"] for event in events if event["event"] == "layer"}) == 15, "whoever solved it"
    again = together(tmp_path / "log", 2, command_line, arguments)
    assert [one.code for one in again] == [1, 1]
    assert "vlaquant, process 1: error:" in again[1].err
    dry = together(tmp_path / "log", 2, command_line, [*arguments, "--dry-run"])
    assert ["total" in one.out for one in dry] == [True, False]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, "-m", "vlaquant", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_torchrun_and_a_killed_process(tmp_path: Path) -> None:
    """The real thing, verified in a fresh process, and once more after one of the two was killed."""
    source, output = make_source(tmp_path / "source", "openvla"), tmp_path / "out"
    episodes = save_observations(tmp_path / "episodes", "calibration", observations(9))
    calibration = {"kind": "episodes", "path": str(episodes), "split": "calibration", "samples": 9}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for("openvla", "gptq", "w4a16", calibration=calibration)), encoding="utf-8")
    arguments = ["quantize", "--config", str(recipe), "--model", str(source), "--output"]

    launcher = start([*arguments, str(output)])
    while launcher.poll() is None and stages_in(output) < 2:
        time.sleep(0.001)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text(encoding="ascii").split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, messages = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert "another process of this run failed or died" in messages
    assert not output.exists()
    assert stages_in(output) >= 2

    for directory, more in ((output, ["--resume"]), (tmp_path / "one", [])):
        launcher = start([*arguments, str(directory), *more])
        printed, messages = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, messages
        assert printed.count("equal bit for bit") == 1
    assert main([*arguments, str(tmp_path / "alone")]) == 0
    assert same_directory(output, tmp_path / "one")
    assert same_directory(output, tmp_path / "alone")
