"""The staged engine: weights on demand, stored outputs and memory limits change nothing in the result."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flowing import WIDTH, Stack
from safetensors.torch import load_file, save_file
from staged import (
    WINDOWS,
    differing,
    in_memory,
    left_behind,
    make_source,
    recipe_for,
    samples_for,
    skip_verification,
    streamed,
    written,
)
from tiny import llama
from torch import Tensor, nn
from watched import hook_count

import vlaquant
from vlaquant.calibrate import observe
from vlaquant.calibrate.cache import ActivationCache
from vlaquant.engine.run import RunOptions
from vlaquant.engine.weights import WeightsOnDemand
from vlaquant.errors import PlanError
from vlaquant.export.compressed_tensors import file_tensors
from vlaquant.linear import QuantLinear
from vlaquant.passes.layer import Work, quantize_layers
from vlaquant.recipe import load_recipe

FLOAT = {"propagate": "float"}
#: A covering choice: every model, quantizer, scheme, mode and way of propagating at least once.
CASES: list[tuple[str, str, str, dict[str, str], str]] = [
    ("llama", "rtn", "w4a16", {}, "replay"),
    ("llama", "rtn mse", "w8a8", {}, "replay"),
    ("llama", "gptq", "w4a16", {}, "replay"),
    ("llama", "gptq", "w8a8", {}, "rerun"),
    ("llama", "gptq", "w8a8", FLOAT, "replay"),
    ("llama", "gptq", "w8a8", FLOAT, "rerun"),
    ("llama", "smoothquant", "w8a8", {}, "replay"),
    ("llama", "smoothquant", "w8a8 static", {}, "rerun"),
    ("llama", "smoothquant", "w8a8", FLOAT, "rerun"),
    ("llama", "awq + gptq", "w4a16", {}, "replay"),
    ("llama tied", "gptq", "w8a8 static", {}, "replay"),
    ("llama tied", "awq", "w4a16", {}, "rerun"),
    ("llama", "gptaq", "w4a16", {}, "replay"),
    ("llama", "awq + gptaq", "w4a16", {}, "replay"),
    ("llama tied", "gptaq", "w8a8 static", {}, "replay"),
    ("openvla", "gptq", "w4a16", {}, "replay"),
    ("openvla", "gptaq", "w8a8", {}, "replay"),
    ("openvla", "smoothquant", "w8a8 static", {}, "rerun"),
    ("openvla", "awq", "w4a16", FLOAT, "replay"),
]
LANGUAGE = {"rules": [{"part": "language", "scheme": "w4a16", "group_size": 32}], "quantizer": {"kind": "gptq"}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_verification(monkeypatch)


@pytest.mark.parametrize(("kind", "quantizer", "scheme", "more", "mode"), CASES, ids=str)
def test_streamed_equals_in_memory(
    tmp_path: Path, kind: str, quantizer: str, scheme: str, more: dict[str, str], mode: str
) -> None:
    """In memory the run always replays, so this also compares the modes."""
    source = make_source(tmp_path / "source", kind)
    recipe = recipe_for(kind, quantizer, scheme, **more)
    samples = None if quantizer.startswith("rtn") else samples_for(kind)
    result = streamed(source, recipe, samples, tmp_path / "out", mode=mode)
    assert result.held is None, "the model was streamed"
    assert left_behind(tmp_path / "out") == []
    assert differing(written(tmp_path / "out"), in_memory(source, recipe, samples)) == []


def test_the_comparison_notices_one_code(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    streamed(source, LANGUAGE, WINDOWS, tmp_path / "out")
    tensors = written(tmp_path / "out")
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["model.layers.1.mlp.up_proj.weight_packed"][0, 0] ^= 1
    assert differing(tensors, changed) == ["model.layers.1.mlp.up_proj.weight_packed"]


def test_what_earlier_stages_became_decides_what_later_ones_see() -> None:
    recipe = recipe_for("llama", "gptq", "w4a16")
    quantized, unchanged = (
        _run_in_memory(llama(), recipe | {"propagate": propagate}) for propagate in ("quantized", "float")
    )
    first = [name for name in quantized if name.startswith("model.layers.0.")]
    later = [name for name in quantized if name.startswith(("model.layers.1.", "lm_head"))]
    assert differing({name: quantized[name] for name in first}, {name: unchanged[name] for name in first}) == []
    packed = [name for name in differing(quantized, unchanged) if name.endswith("weight_packed")]
    assert len(packed) == 8, "every layer of the second block and the head saw other inputs"
    assert set(packed) <= set(later)


@pytest.mark.parametrize("propagate", ["quantized", "float"])
def test_a_stage_is_what_the_solver_makes_of_the_inputs_it_should_see(propagate: str) -> None:
    """An oracle without the engine: put the finished first block into a float model by hand, observe, solve."""
    packed = llama()
    vlaquant.quantize(packed, LANGUAGE | {"propagate": propagate}, samples=WINDOWS)
    model = llama()
    if propagate == "quantized":
        for name, layer in packed.named_modules():
            if isinstance(layer, QuantLinear) and ".layers.0." in name:
                model.get_submodule(name).weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    names = [name for name, layer in packed.named_modules() if isinstance(layer, QuantLinear) and ".layers.1." in name]
    with torch.inference_mode(), observe(model, names, hessian_for=names) as observation:
        for index, sample in enumerate(WINDOWS):
            observation.begin_sample(index=index)
            model(input_ids=sample, use_cache=False)
    stats = observation.stats()
    assert len(names) == 7
    for name in names:
        engine: Any = packed.get_submodule(name)
        weight = model.get_parameter(f"{name}.weight").detach()
        work = Work(weight, None, engine.scheme, stats[name], torch.float32)
        codes, _ = quantize_layers({name: work}, load_recipe(LANGUAGE).layer_quantizer)[name]
        assert torch.equal(codes.dequantize(), engine.dequantize()), name


def _run_in_memory(model: nn.Module, recipe: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    vlaquant.quantize(model, recipe, samples=WINDOWS, options=RunOptions(**options))
    return file_tensors(model)


class Flat(nn.Module):
    """No list of blocks: every Linear is a stage of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.down(torch.relu(self.up(x)))) + x)
        return out


class Piecewise(Stack):
    """Whoever holds the blocks calls their layers one by one, so that no block ever runs as a whole."""

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.inner(x)
        return x


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static", "w8a16"])
@pytest.mark.parametrize("kind", ["flat", "piecewise"])
def test_models_of_no_known_family(kind: str, scheme: str) -> None:
    torch.manual_seed(0)
    model = Flat() if kind == "flat" else Piecewise()
    samples = [torch.randn(2, 40, 32 if kind == "flat" else WIDTH) for _ in range(3)]
    recipe = {"rules": [{"part": "model", "scheme": scheme}], "quantizer": {"kind": "gptq"}}

    def run(mode: str) -> dict[str, Tensor]:
        mine = copy.deepcopy(model).eval()
        vlaquant.quantize(
            mine,
            recipe,
            samples=samples,
            run=lambda m, x: m(x),
            options=RunOptions(mode=mode),  # type: ignore[arg-type]
        )
        assert hook_count(mine) == 0
        assert all(isinstance(m, QuantLinear) for m in mine.modules() if "Linear" in type(m).__name__)
        with torch.inference_mode():
            error = (mine(samples[0]) - model(samples[0])).norm() / model(samples[0]).norm()
        assert error < 0.05
        return mine.state_dict()

    assert differing(run("replay"), run("rerun")) == []


def _most_resident(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts, while runs go on, the most units whose weights are in memory at once."""
    seen = {"units": 0, "loads": 0}
    need, load = WeightsOnDemand.need, WeightsOnDemand._load_

    def counting_need(self: WeightsOnDemand, unit: str) -> None:
        need(self, unit)
        seen["units"] = max(seen["units"], len(self._resident))
        held = {
            name
            for name, tensor in self._model.state_dict(keep_vars=True).items()
            for owner in self._units
            if name.startswith(f"{owner}.") and not tensor.is_meta
        }
        units = {owner for owner in self._units if any(name.startswith(f"{owner}.") for name in held)}
        assert units == set(self._resident), "what counts as resident is what has weights"

    def counting_load(self: WeightsOnDemand, unit: Any) -> int:
        seen["loads"] += 1
        return load(self, unit)

    monkeypatch.setattr(WeightsOnDemand, "need", counting_need)
    monkeypatch.setattr(WeightsOnDemand, "_load_", counting_load)
    return seen


@pytest.mark.parametrize("mode", ["replay", "rerun"])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_room_for_one_unit_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, mode: str) -> None:
    source = make_source(tmp_path / "source", "llama")
    recipe = recipe_for("llama", "smoothquant", scheme)
    seen = _most_resident(monkeypatch)
    streamed(source, recipe, WINDOWS, tmp_path / "roomy", mode=mode)
    assert seen["units"] == (3 if mode == "rerun" else 2), "all at once, if units run again and there is memory"
    roomy, seen["units"], seen["loads"] = seen["loads"], 0, 0
    monkeypatch.setattr(WeightsOnDemand, "budget", property(lambda self: 0, lambda self, value: None), raising=False)
    streamed(source, recipe, WINDOWS, tmp_path / "narrow", mode=mode)
    assert seen["units"] <= 2, "the one being worked on, and the one that runs"
    assert seen["loads"] > roomy
    assert differing(written(tmp_path / "narrow"), written(tmp_path / "roomy")) == []


def test_no_hooks_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    vlaquant.quantize(model, LANGUAGE, samples=WINDOWS)
    assert hook_count(model) == 0
    held: list[nn.Module] = []
    init = WeightsOnDemand.__init__

    def remembering(self: WeightsOnDemand, model: nn.Module, *args: Any, **more: Any) -> None:
        held.append(model)
        init(self, model, *args, **more)

    monkeypatch.setattr(WeightsOnDemand, "__init__", remembering)
    source = make_source(tmp_path / "source", "llama")
    streamed(source, recipe_for("llama", "smoothquant", "w8a8"), WINDOWS, tmp_path / "out")
    assert [hook_count(one) for one in held] == [0]
    assert not any("forward" in vars(module) for module in held[0].modules())


def _base_memory(monkeypatch: pytest.MonkeyPatch, run: Callable[[int], object]) -> int:
    """What a run needs apart from activations, as its refusal says it; the process counts as 100 MB."""
    for room in ("prediction", "run"):
        monkeypatch.setattr(f"vlaquant.engine.{room}.resident_memory", lambda: 10**8)
    low, high = 10**8, 10**9
    while high - low > 1:
        middle = (low + high) // 2
        try:
            with monkeypatch.context() as inner:
                inner.setattr("vlaquant.engine.run.QuantizationRun._identify", _stop)
                run(middle)
        except PlanError:
            low = middle
        except _EnoughError:
            high = middle
    return high


class _EnoughError(Exception):
    pass


def _stop(*_: object) -> None:
    raise _EnoughError


@pytest.mark.parametrize(("mode", "quantizer"), [("replay", "gptq"), ("rerun", "gptq"), ("replay", "gptaq")])
def test_a_memory_limit_spills_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, quantizer: str
) -> None:
    source, recipe = make_source(tmp_path / "source", "llama"), LANGUAGE | {"quantizer": {"kind": quantizer}}
    streamed(source, recipe, WINDOWS, tmp_path / "roomy", mode=mode)
    # One window's outputs are 24 × 64 floats
    output = 24 * 64 * 4
    base = _base_memory(
        monkeypatch, lambda limit: streamed(source, recipe, WINDOWS, tmp_path / "no", max_memory=limit, mode=mode)
    )
    most = {"memory": 0, "spilled": 0}
    put = ActivationCache.put

    def watched(self: ActivationCache, *args: Any) -> None:
        put(self, *args)
        most["memory"] = max(most["memory"], self.bytes_in_memory)
        most["spilled"] = max(most["spilled"], self.bytes_spilled)

    monkeypatch.setattr(ActivationCache, "put", watched)
    streamed(source, recipe, WINDOWS, tmp_path / "narrow", max_memory=base + output, mode=mode)
    if mode == "replay":
        assert 0 < most["memory"] <= output
        assert most["spilled"] >= 2 * output
    assert differing(written(tmp_path / "narrow"), written(tmp_path / "roomy")) == []
    assert left_behind(tmp_path / "narrow") == []


def test_too_little_memory_is_refused_with_the_figures(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    with pytest.raises(PlanError, match=r"needs \d\.\d\d GiB of memory for model\.layers\.0, and has 0\.01 GiB"):
        streamed(source, LANGUAGE, WINDOWS, tmp_path / "out", max_memory=10**7)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_files_with_other_names_are_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    """The name of the base model goes without its prefix in files that the base model wrote."""
    source = make_source(tmp_path / "source", "llama")
    wanted = in_memory(source, LANGUAGE, WINDOWS)
    file = source / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    result = streamed(source, LANGUAGE, WINDOWS, tmp_path / "out")
    assert result.held is None
    assert differing(written(tmp_path / "out"), wanted) == []


def test_files_that_transformers_casts_are_read_as_a_whole(tmp_path: Path) -> None:
    """vlaquant then holds the model in memory, and says so."""
    source = make_source(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    wanted = in_memory(source, LANGUAGE, WINDOWS)
    log = tmp_path / "run.jsonl"
    result = streamed(source, LANGUAGE, WINDOWS, tmp_path / "out", log=log)
    assert result.held is not None
    notes = [line["text"] for line in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if "text" in line]
    reason = "lm_head.weight is torch.float32 in the files, torch.bfloat16 wanted"
    assert f"the whole model is held in memory, because {reason}" in notes, notes
    assert differing(written(tmp_path / "out"), wanted) == []


def test_the_last_layer_of_a_stage_computes_only_for_later_stages() -> None:
    """While a stage is observed its last layer is read, and then the run ends; what it computes nobody asks for."""
    model = llama()
    ran = dict.fromkeys(("up_proj", "down_proj"), 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            ran[name] += 1

        return hook

    for name in ran:
        model.model.layers[0].mlp.get_submodule(name).register_forward_hook(count(name))
    vlaquant.quantize(model, recipe_for("llama", "gptq", "w4a16"), samples=list(WINDOWS))
    assert ran["up_proj"] - ran["down_proj"] == len(WINDOWS)
