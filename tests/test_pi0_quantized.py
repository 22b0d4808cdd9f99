"""π0 from a directory in published names to a quantized one, what that policy can do, and who else can open it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pi0 import pi0, robot_observations, save_pi0
from torch import Tensor, nn
from transformers import CompressedTensorsConfig, PI0ForConditionalGeneration

import vlaquant
from vlaquant.engine.run import RunOptions
from vlaquant.export.compressed_tensors import file_tensors, to_quantization_config
from vlaquant.families.pi0 import PI0
from vlaquant.linear import QuantLinear
from vlaquant.result import QuantizationResult

PARTS = ("language", "expert", "vision", "projector", "action")
W4A16: dict[str, Any] = {
    "rules": [
        *({"part": part, "scheme": "w4a16", "group_size": 32} for part in PARTS),
        *({"part": part, "modules": "embedding", "scheme": "w8a16"} for part in ("language", "expert")),
    ],
    "transforms": [{"kind": "awq", "grid": 4}],
    "quantizer": {"kind": "gptq"},
}
W8A8: dict[str, Any] = {
    "rules": [{"part": part, "scheme": "w8a8"} for part in PARTS],
    "transforms": [{"kind": "smoothquant", "alpha": 0.5}],
    "quantizer": {"kind": "rtn"},
}
#: Mean action error relative to the mean action: twice what was measured on this policy, whose weights are random.
WORST = 0.05


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantizationResult]:
    """Both schemes, from LeRobot's names."""
    folder = tmp_path_factory.mktemp("pi0")
    source = save_pi0(folder / "source", pi0(), "hub")
    seen = robot_observations(4)
    return {
        name: vlaquant.quantize(
            source, recipe, samples=seen, output=folder / name, options=RunOptions(log=folder / f"{name}.jsonl")
        )
        for name, recipe in {"w4a16": W4A16, "w8a8": W8A8}.items()
    }


def _inputs() -> dict[str, Tensor]:
    return PI0.inputs(pi0(), robot_observations(5)[4])


def _act(model: Any) -> Tensor:
    assert PI0.act is not None
    with torch.inference_mode():
        return PI0.act(model, _inputs())


@pytest.mark.parametrize("name", ["w4a16", "w8a8"])
def test_a_quantized_policy_acts_as_before(results: dict[str, QuantizationResult], name: str) -> None:
    result = results[name]
    assert result.output is not None
    assert result.manifest["verification"]["output"] == "equal bit for bit"
    log = (result.output.parent / f"{name}.jsonl").read_text(encoding="utf-8")
    assert "weights are read when their turn comes" in log
    model, wanted = vlaquant.load(result.output), _act(pi0())
    error = float((_act(model) - wanted).abs().mean() / wanted.abs().mean())
    assert 0 < error < WORST
    assert torch.equal(_act(model), _act(vlaquant.load(result.output)))


def test_padding_is_in_no_statistic() -> None:
    """What stands in the padding changes what layers compute there, and nothing of the result."""
    found = []
    for token in ("<PAD>", "<q1>"):
        model: Any = pi0()
        model.processor.tokenizer.pad_token = token
        vlaquant.quantize(model, W4A16, samples=robot_observations(4))
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("name", ["w4a16", "w8a8"])
def test_every_weight_has_a_verdict_and_every_byte_is_counted(
    results: dict[str, QuantizationResult], name: str
) -> None:
    result, model = results[name], pi0()
    assert result.output is not None
    plan = result.plan
    linears = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {layer.name for layer in plan.layers} == linears
    kept = {layer.name: layer.reason for layer in plan.layers if layer.scheme is None}
    assert set(kept) == {key for key in linears if PI0.part_of(key) == "action"}
    table = " ".join(str(plan).split())  # long reasons are wrapped
    assert all(kept[key] == PI0.why_float(key) and kept[key] in table for key in kept)
    dead = {layer.name for layer in plan.layers if layer.dead}
    assert dead == PI0.dead(model).keys()
    assert len(plan.quantized) == len(linears) - len(kept)
    loaded = vlaquant.load(result.output)
    packed = {key for key, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    assert packed == set(plan.quantized)
    tensors = load_file(result.output / "model.safetensors")
    assert plan.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    assert plan.bytes_before == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_the_export_has_live_names_and_copies_what_stays(results: dict[str, QuantizationResult]) -> None:
    model, result = pi0(), results["w8a8"]
    assert result.output is not None
    tensors = load_file(result.output / "model.safetensors")
    whole = {name for name in model.state_dict() if name.rpartition(".")[0] not in result.plan.quantized}
    assert {"embed_action_time.state_proj.weight", "model.dit.embed_tokens.weight"} <= whole
    changed = {name.rpartition(".")[0] for name in whole if not torch.equal(tensors[name], model.state_dict()[name])}
    # Scales were folded into norms, and everything else is as it was
    assert changed == {record.source for record in result.transforms if record.kept and "norm" in record.source}
    assert changed
    assert (result.output / "processor_config.json").is_file()


@pytest.mark.parametrize("name", ["w4a16", "w8a8"])
def test_a_quantized_policy_is_a_module_like_any_other(results: dict[str, QuantizationResult], name: str) -> None:
    output = results[name].output
    assert output is not None
    model: Any = vlaquant.load(output)
    wanted = _act(model)
    layer = model.model.dit.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear)
    assert layer.weight.dtype is torch.float32
    twin = copy.deepcopy(model)
    assert torch.equal(_act(twin), wanted)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert torch.equal(_act(model), wanted)
    assert not torch.equal(_act(twin), wanted)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(_act(twin), wanted)
    twin.to(torch.bfloat16)
    assert twin.model.dit.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16
    assert PI0.act is not None
    inputs = PI0.inputs(twin, robot_observations(5)[4])
    with torch.inference_mode():
        halved = PI0.act(twin, inputs)
    assert float((halved - wanted).abs().mean() / wanted.abs().mean()) < 0.1


@pytest.mark.slow
def test_a_quantized_policy_can_be_compiled(results: dict[str, QuantizationResult]) -> None:
    output = results["w4a16"].output
    assert output is not None
    model: Any = vlaquant.load(output)
    inputs = _inputs()
    with torch.no_grad():
        wanted = model(**inputs).logits
        compiled = torch.compile(model, backend="aot_eager")(**inputs).logits
    assert torch.allclose(compiled, wanted, atol=1e-5)


# What transformers makes of our directories


def _written(directory: Path, rules: list[dict[str, Any]]) -> nn.Module:
    """A quantized policy, and its directory as vlaquant writes it."""
    model: Any = pi0()
    vlaquant.quantize(model, {"rules": rules, "quantizer": {"kind": "rtn"}})
    directory.mkdir()
    save_file(file_tensors(model), directory / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": to_quantization_config(model)}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def _opened(directory: Path, **options: Any) -> Any:
    return PI0ForConditionalGeneration.from_pretrained(directory, local_files_only=True, **options).eval()


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our layers unpack their weights, as transformers does: equal, bit for bit."""
    monkeypatch.setenv("VLAQUANT_KERNEL", "reference")


_FOUR = [{"part": part, "scheme": "w4a16", "group_size": 32} for part in ("language", "expert")]
_EIGHT = [{"part": "vision", "scheme": "w8a16"}]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_dequantizes_the_same_policy(tmp_path: Path, unpacked: None) -> None:
    model = _written(tmp_path / "four", _FOUR)
    opened = _opened(tmp_path / "four", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(PI0.run(opened, _inputs()), PI0.run(model, _inputs()))


def test_transformers_unpacks_when_the_policy_is_called(tmp_path: Path, unpacked: None) -> None:
    """It does so in a hook of the whole model, which ``sample_actions`` goes around: an error, and no action."""
    model = _written(tmp_path / "four", _FOUR)
    opened, inputs = _opened(tmp_path / "four"), _inputs()
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        PI0.run(opened, inputs)
    with torch.no_grad():
        opened(**inputs)
        assert torch.equal(PI0.run(opened, inputs), PI0.run(model, inputs))


def test_transformers_cannot_open_a_packed_vision_tower(tmp_path: Path) -> None:
    """Its SigLIP wants to initialize a weight that is packed."""
    _written(tmp_path / "mixed", _FOUR + _EIGHT)
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        _opened(tmp_path / "mixed")


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_does_not_mistake_one_scheme_for_another(tmp_path: Path) -> None:
    """On dequantizing it takes the first scheme for all layers; with the widest first, the others do not fit."""
    _written(tmp_path / "mixed", _FOUR + _EIGHT)
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        _opened(tmp_path / "mixed", quantization_config=CompressedTensorsConfig(dequantize=True))
