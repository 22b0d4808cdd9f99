"""One action by part: the clock on a policy whose parts take known times, every family, and the demo policy."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_demo_policy import EPISODES, POLICY
from tiny import llama, observations, openvla, save_llama, save_observations, save_openvla
from tiny_families import TINY
from tiny_pi0 import pi0, save_pi0
from torch import nn

import vlaquant
from vlaquant.benchmark.action import ActionSettings, bench_action
from vlaquant.benchmark.tables import action_table
from vlaquant.cli import main
from vlaquant.errors import EvaluationError
from vlaquant.evaluate.memory import resident_bytes
from vlaquant.evaluate.parts import AFTER, BEFORE, BETWEEN, PartClock, borders, clocked, part_names
from vlaquant.evaluate.timing import CLOCKS
from vlaquant.families import FAMILIES

ACTING = [name for name in TINY if FAMILIES[name.partition(":")[0]].act is not None]


class _Clock:
    """One that moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Takes(nn.Module):
    def __init__(self, clock: _Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self) -> None:
        self.clock.now += self.seconds


def test_time_belongs_to_the_part_that_it_passes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setitem(CLOCKS, "wall", clock)
    model = nn.ModuleDict({"eye": _Takes(clock, 1.0), "ear": _Takes(clock, 2.0), "hand": _Takes(clock, 4.0)})
    with clocked(model, {"eye": "see", "ear": "see", "hand": "act"}, PartClock()) as found:
        clock.now += 0.1  # before
        model["eye"]()
        clock.now += 0.2  # between two modules of one part
        model["ear"]()
        clock.now += 0.4  # between parts
        model["hand"]()
        model["hand"]()
        clock.now += 0.8  # after
    expected = {BEFORE: 0.1, "see": 3.2, BETWEEN: 0.4, "act": 8.0, AFTER: 0.8}
    assert found.seconds == pytest.approx(expected)
    assert (found.calls("see"), found.calls("act"), found.calls("smell")) == (1, 2, 0)
    assert borders(found.visits) == {"eye", "ear", "hand"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_the_borders_of_a_part_are_watched() -> None:
    visits = [("a", "1"), ("a", "2"), ("a", "3"), ("b", "4"), ("a", "2"), ("b", "5"), ("b", "6")]
    assert borders(visits) == {"1", "3", "4", "2", "5", "6"}
    model = openvla()
    inputs = FAMILIES["openvla"].example(model)
    act = FAMILIES["openvla"].act
    assert act is not None
    with clocked(model, part_names(model), PartClock()) as probe:
        act(model, inputs)
    watched = {name: part for name, part in part_names(model).items() if name in borders(probe.visits)}
    assert len(watched) < 12 < len(part_names(model))
    with clocked(model, watched, PartClock()) as again:
        act(model, inputs)
    assert again.seconds.keys() == probe.seconds.keys() >= {"vision", "projector", "language", "action"}


def test_watching_leaves_the_fast_way_through_a_block_alone() -> None:
    model: Any = openvla(parallel=False)
    with clocked(model, part_names(model), PartClock()):
        blocks = [*model.language_model.model.layers, model.language_model, model.language_model.model]
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_token_policies_are_split_into_prefill_and_decode(tmp_path: Path) -> None:
    source = save_openvla(tmp_path / "policy", openvla(parallel=False))
    episodes = save_observations(tmp_path / "episodes", "evaluation", observations(2))
    result = bench_action(ActionSettings(source, episodes=episodes, rounds=3))
    (found,) = result["versions"].values()
    assert {BEFORE, "vision", "projector", "prefill", "decode", AFTER} <= found["parts"].keys()
    assert not {"language", "action"} & found["parts"].keys()
    decode, per_token = found["parts"]["decode"], found["parts"]["decode, per token"]
    assert decode["calls"] == 3.0  # of four tokens the prompt's pass makes the first
    assert found["parts"]["prefill"]["calls"] == 1.0
    assert per_token["median_ms"] == pytest.approx(decode["median_ms"] / 3)


@pytest.mark.parametrize("name", ACTING)
def test_every_family_that_acts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TINY[name].save(tmp_path / "source", monkeypatch)
    settings = ActionSettings(source, source, rounds=1, dtypes=("stored",), threads=1)
    result = bench_action(settings)
    assert json.loads(json.dumps(result)) == result
    assert result["settings"]["family"] == name.partition(":")[0]
    assert result["versions"].keys() == {"model stored", "reference stored"}
    family = FAMILIES[name.partition(":")[0]]
    for version in result["versions"].values():
        assert version["parts"].keys() - {BEFORE, BETWEEN, AFTER} <= {
            "other",
            "prefill",
            "decode",
            "decode, per token",
        } | {part for part, _ in family.parts}
        assert {"vision"} <= version["parts"].keys()
        shares = [part["median_ms"] for label, part in version["parts"].items() if label != "decode, per token"]
        assert sum(shares) == pytest.approx(version["sum_of_parts_ms"])
    assert max(map(len, action_table(result).splitlines())) <= 100


def test_candidate_against_reference_in_two_dtypes(tmp_path: Path) -> None:
    source = save_openvla(tmp_path / "source", openvla())
    packed = tmp_path / "packed"
    vlaquant.quantize(source, {"rules": [{"part": "language", "scheme": "w4a16", "group_size": 32}]}, output=packed)
    settings = ActionSettings(packed, source, rounds=2, model_dtypes=("stored", "bfloat16"))
    result = bench_action(settings)
    versions = result["versions"]
    assert [*versions] == ["model stored", "model bfloat16", "reference float32", "reference bfloat16"]
    assert versions["reference float32"]["resident_bytes"] == resident_bytes(vlaquant.load(source))
    half = versions["reference bfloat16"]["resident_bytes"] / versions["reference float32"]["resident_bytes"]
    assert half == pytest.approx(0.5, rel=0.01)
    assert len(result["ratios"]) == 4
    for one in result["ratios"]:
        medians = [versions[one[who]]["median_ms"] for who in ("against", "of")]
        assert one["times"] == pytest.approx(medians[0] / medians[1])
    assert "model stored against reference float32" in action_table(result)


def test_a_cast_leaves_computed_tables_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def count(model: Any) -> int:
        seen.append(model)
        return 0

    monkeypatch.setattr("vlaquant.benchmark.action.resident_bytes", count)
    source = save_pi0(tmp_path / "source", pi0())
    bench_action(ActionSettings(source, rounds=1, model_dtypes=("bfloat16",)))
    (model,) = seen
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tables = [tensor for name, tensor in model.named_buffers() if name.endswith("inv_freq")]
    assert tables
    assert {tensor.dtype for tensor in tables} == {torch.float32}


def test_rounds_are_interleaved_and_share_observations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []
    source = save_openvla(tmp_path / "source", openvla())
    episodes = save_observations(tmp_path / "episodes", "evaluation", observations(2))

    def ask(model: Any, observation: Any) -> None:
        asked.append((id(model), observation.episode))
        model.projector(torch.zeros(1, 4, model.projector.fc1.in_features))

    monkeypatch.setattr("vlaquant.benchmark.action.ask", ask)
    bench_action(ActionSettings(source, source, episodes, rounds=2, dtypes=("stored",)))
    timed = asked[-16:]  # 4 rounds with the warm-up, of 2 versions, whole and by part
    rounds = [timed[start : start + 4] for start in range(0, 16, 4)]
    assert [{episode for _, episode in one} for one in rounds] == [{0}, {1}, {0}, {1}]
    assert all(len({model for model, _ in one}) == 2 for one in rounds)
    assert len({one[0] for one in rounds}) > 1  # not always the same one first


def test_policies_that_cannot_be_compared(tmp_path: Path) -> None:
    policy, language = save_openvla(tmp_path / "policy", openvla()), save_llama(tmp_path / "llama", llama())
    with pytest.raises(EvaluationError, match="different classes, LlamaForCausalLM and OpenVLA"):
        bench_action(ActionSettings(policy, language))
    with pytest.raises(EvaluationError, match="takes no actions"):
        bench_action(ActionSettings(language))


def test_a_dtype_that_a_policy_cannot_act_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("expected Float but found BFloat16")

    monkeypatch.setattr("vlaquant.benchmark.action._action", lambda *_: fails)
    with pytest.raises(
        EvaluationError, match=r"model stored: cannot act: RuntimeError: expected Float .* such as stored"
    ):
        bench_action(ActionSettings(save_openvla(tmp_path / "policy", openvla())))


def test_the_demo_policy_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(POLICY), "--reference", str(POLICY), "--episodes", str(EPISODES), "--rounds", "1"]
    started = time.process_time()
    assert main([*arguments, "--threads", "1", "--json", str(tmp_path / "r.json")]) == 0
    spent = 1e3 * (time.process_time() - started)
    printed = capsys.readouterr().out
    assert "before (pre-processing)" in printed
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert result["settings"]["observed"] == "observations: 1 recorded"
    assert result["settings"]["threads"] == 1
    assert result["versions"].keys() == {"model stored", "reference float32", "reference bfloat16"}
    assert all(0.0 < version["min_ms"] < spent for version in result["versions"].values())


def test_missing_directories_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([str(tmp_path / "no")], [str(POLICY), "--reference", str(tmp_path / "no")]):
        assert main(["bench", *arguments]) == 1
        assert "no such directory" in capsys.readouterr().err
    assert main(["bench", str(POLICY), "--episodes", str(tmp_path)]) == 1
    assert "no split 'evaluation'" in capsys.readouterr().err
