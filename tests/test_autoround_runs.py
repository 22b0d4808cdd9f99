"""AutoRound in whole runs: it lowers the error it says it lowers, and runs of every kind end in the same bytes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import together
from staged import (
    WINDOWS,
    differing,
    files_of,
    in_memory,
    killed_after,
    left_behind,
    make_source,
    recipe_for,
    samples_for,
    skip_verification,
    streamed,
    written,
)
from tiny_families import SCHEMES, TINY, family_of, quantized
from torch import Tensor, nn

import vlaquant
from vlaquant.calibrate.cache import ActivationCache
from vlaquant.engine.run import RunOptions
from vlaquant.errors import CalibrationError, RecipeError

TUNED: dict[str, Any] = {"quantizer": {"kind": "autoround", "iterations": 12, "batch": 2}}
W2 = {"scheme": "w2a16", "group_size": 32}
#: Families of which some blocks do not run once a sample, or do not give all of their result back.
REFUSED = {"pi0: π0", "lerobot: SmolVLA look-alike", "lerobot: π0.5 look-alike", "groot: GR00T N1.7 look-alike"}


def tuned(kind: str = "llama", scheme: str = "w4a16", **more: Any) -> dict[str, Any]:
    """Weights without activations have two bits, which gain most."""
    recipe = {**recipe_for(kind, "gptq", scheme), **TUNED, **more}
    if scheme == "w4a16":
        recipe["rules"] = [{**rule, "bits": 2} for rule in recipe["rules"]]
    return recipe


def w2(quantizer: dict[str, Any]) -> dict[str, Any]:
    return {"rules": [{"part": part, **W2} for part in ("language", "head")], "quantizer": quantizer}


def events(log: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == "autoround"]


@torch.no_grad()
def block_outputs(model: nn.Module, block: str) -> list[Tensor]:
    """What a block returns in the whole model, [t, width] for each window."""
    seen: list[Tensor] = []
    hook = model.get_submodule(block).register_forward_hook(
        lambda _m, _a, output: seen.append((output if isinstance(output, Tensor) else output[0])[0])
    )
    for window in WINDOWS:
        model(window, use_cache=False)
    hook.remove()
    return seen


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "w8a8 static"])
def test_the_loss_in_the_log_is_that_of_the_blocks_in_the_models(tmp_path: Path, scheme: str) -> None:
    """Every block, with all earlier ones quantized, against the same block in the float model."""
    source = make_source(tmp_path / "source", "llama")
    model = vlaquant.load(source)
    vlaquant.quantize(model, tuned(scheme=scheme), samples=WINDOWS, options=RunOptions(log=tmp_path / "log"))
    reference = vlaquant.load(source)
    found = events(tmp_path / "log")
    assert [event["unit"] for event in found] == ["model.layers.0", "model.layers.1", "lm_head"]
    for event in found:
        mine, wanted = block_outputs(model, event["unit"]), block_outputs(reference, event["unit"])
        error = sum(float((a - b).square().sum()) for a, b in zip(mine, wanted, strict=True))
        power = sum(float(b.square().sum()) for b in wanted)
        assert event["loss"] == pytest.approx(error / power, rel=0.02)
        assert event["loss"] <= event["loss_start"]


def test_two_bits_gain_over_their_start(tmp_path: Path) -> None:
    source, reference = make_source(tmp_path / "source", "llama"), None
    errors, learnt = [], {"kind": "autoround", "iterations": 60, "batch": 3}
    for quantizer in ({"kind": "gptq"}, learnt, {**learnt, "dtype": "bfloat16"}):
        model = vlaquant.load(source)
        vlaquant.quantize(model, w2(quantizer), samples=WINDOWS)
        reference = block_outputs(vlaquant.load(source), "model.layers.1")
        outputs = block_outputs(model, "model.layers.1")
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(outputs, reference, strict=True)))
    assert max(errors[1:]) < 0.8 * errors[0]
    assert errors[2] != errors[1], "one of them was not computed as it was asked for"


@pytest.mark.parametrize(("kind", "scheme"), [("llama", "w4a16"), ("llama tied", "w8a8"), ("openvla", "w4a16")])
def test_resumed_and_in_memory_runs_end_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, scheme: str
) -> None:
    skip_verification(monkeypatch)
    source, samples, recipe = make_source(tmp_path / "source", kind), samples_for(kind), tuned(kind, scheme)
    streamed(source, recipe, samples, tmp_path / "whole")
    wanted = files_of(tmp_path / "whole")
    for stages in (1, 2):
        output = tmp_path / f"out{stages}"
        with killed_after(stages):
            streamed(source, recipe, samples, output)
        streamed(source, recipe, samples, output, resume=True)
        assert files_of(output) == wanted
        assert left_behind(output) == []
    assert differing(in_memory(source, recipe, samples), written(tmp_path / "whole")) == []


def test_the_seed_decides(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    recipes = [{**w2({"kind": "autoround", "iterations": 20, "batch": 2}), "seed": seed} for seed in (0, 0, 1)]
    first, again, other = (in_memory(source, recipe, WINDOWS) for recipe in recipes)
    assert differing(first, again) == []
    assert differing(first, other) != []


def test_the_comparison_notices_a_float_chain_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run that took the quantized outputs for those of the float model would learn something else."""
    skip_verification(monkeypatch)
    source, recipe = make_source(tmp_path / "source", "llama"), tuned(scheme="w4a16")
    streamed(source, recipe, WINDOWS, tmp_path / "whole")
    with killed_after(1):
        streamed(source, recipe, WINDOWS, tmp_path / "out")
    monkeypatch.setattr("vlaquant.engine.run.FLOAT_CHAIN", "")
    streamed(source, recipe, WINDOWS, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") != files_of(tmp_path / "whole")


def test_transforms_and_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ before, and no memory for activations: the same as with memory."""
    skip_verification(monkeypatch)
    source = make_source(tmp_path / "source", "llama")
    recipe = tuned(transforms=[{"kind": "awq", "grid": 4}])
    streamed(source, recipe, WINDOWS, tmp_path / "roomy")
    monkeypatch.setattr("vlaquant.engine.run.ActivationCache", _nothing_in_memory)
    streamed(source, recipe, WINDOWS, tmp_path / "tight")
    assert differing(written(tmp_path / "roomy"), written(tmp_path / "tight")) == []


def test_token_weights_weigh_the_output_of_blocks(tmp_path: Path) -> None:
    """With the same codes to begin with, images that count for nothing lead elsewhere, and the action gets nearer."""
    source, samples = make_source(tmp_path / "source", "openvla"), samples_for("openvla")
    quantizer = {"kind": "autoround", "iterations": 20, "batch": 4, "start": {"kind": "rtn"}}
    rules = {"rules": [{"part": "language", **W2}], "quantizer": quantizer}
    losses = []
    for number, weights in enumerate((None, {"kind": "types", "image": 0.0, "text": 0.0})):
        log, recipe = tmp_path / f"log{number}", rules | ({} if weights is None else {"token_weights": weights})
        vlaquant.quantize(vlaquant.load(source), recipe, samples=samples, options=RunOptions(log=log))
        losses.append([(event["loss_start"], event["loss"]) for event in events(log)])
    assert len(losses[0]) == len(losses[1]) == 2
    assert losses[0][0][0] != pytest.approx(losses[1][0][0], rel=0.01)
    assert losses[1][0][1] < losses[1][0][0]


def _nothing_in_memory(*, limit_bytes: int, spill_directory: Path) -> Any:
    del limit_bytes
    return ActivationCache(limit_bytes=0, spill_directory=spill_directory)


def run_shared(source: Path, output: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        skip_verification(patched)
        result = streamed(source, tuned(), WINDOWS, output)
    sys.stdout.write(f"{[record.to_dict() for record in result.layers]}\n")


def test_two_processes_share_the_samples(tmp_path: Path) -> None:
    """The same bytes in every run of two processes, and nearly the same as from one."""
    source = make_source(tmp_path / "source", "llama")
    for name in ("first", "second"):
        ended = together(tmp_path / f"log {name}", 2, run_shared, source, tmp_path / name)
        assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
        assert ended[0].out == ended[1].out
    assert differing(written(tmp_path / "first"), written(tmp_path / "second")) == []
    run_shared(source, tmp_path / "alone")
    alone, shared = written(tmp_path / "alone"), written(tmp_path / "first")
    assert alone.keys() == shared.keys()
    same = [float((alone[name] == shared[name]).double().mean()) for name in alone]
    assert min(same) > 0.9


def test_refusals(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    with pytest.raises(CalibrationError, match="use mode replay"):
        in_memory(source, tuned(), WINDOWS, mode="rerun")
    with pytest.raises(RecipeError, match="remove 'propagate'"):
        vlaquant.load_recipe(tuned(propagate="float"))
    with pytest.raises(RecipeError, match="calibration: missing"):
        vlaquant.quantize(source, tuned())
    with pytest.raises(RecipeError, match=r"quantizer\.start\.damp"):
        vlaquant.load_recipe(tuned() | {"quantizer": {"kind": "autoround", "start": {"kind": "gptq", "damp": 2.0}}})


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_tuned_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a directory to one that another process loads and that acts as the model in memory; or a clear no."""
    monkeypatch.setitem(SCHEMES, "autoround", {"rule": {"scheme": "w4a16", "group_size": 32}, **TUNED})
    directory = TINY[name].save(tmp_path / "float", monkeypatch)
    assert family_of(directory).name == name.partition(":")[0]
    if name in REFUSED:
        with pytest.raises(CalibrationError, match="autoround needs blocks that run once a sample"):
            quantized(name, "autoround", directory, tmp_path / "packed")
        return
    outcome = quantized(name, "autoround", directory, tmp_path / "packed")
    assert outcome.verified == "equal bit for bit"
    assert outcome.same
    assert outcome.error < 0.2
