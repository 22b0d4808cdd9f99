"""What is written reads back equal: by us, and by transformers with compressed-tensors."""

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_loaders import kernel_range
from safetensors.torch import load_file, save_file
from tiny import llama, observations, openvla, save_llama, save_openvla
from torch import nn
from transformers import AutoModelForCausalLM

import vlaquant
from vlaquant.checkpoint import MANIFEST, join_tensor_files, read_config, read_manifest, write_json
from vlaquant.engine.fingerprint import digest
from vlaquant.errors import CheckpointError, ExportError
from vlaquant.export.compressed_tensors import (
    file_tensors,
    format_of,
    from_quantization_config,
    quantized_layers,
    target_patterns,
    to_quantization_config,
)
from vlaquant.export.verify import verify
from vlaquant.families import FAMILIES, Family
from vlaquant.models.openvla import OpenVLAForActionPrediction

TOKENS = torch.arange(20).reshape(1, 20)
SCHEMES: dict[str, dict[str, Any]] = {
    "w4 group": {"scheme": "w4a16", "group_size": 64},
    "w3 group": {"scheme": "w3a16", "group_size": 64},
    "w8 channel": {"scheme": "w8a16"},
    "w8a8": {"scheme": "w8a8"},
    "w8a8 static": {"scheme": "w8a8_static"},
}


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the fresh process, where a test compares in its own way."""
    monkeypatch.setattr("vlaquant.export.writing.verify", lambda *_: {"tensors": 0, "output": "skipped by a test"})


def write_llama(
    tmp_path: Path, *rules: dict[str, Any], dtype: torch.dtype = torch.bfloat16, tied: bool = False
) -> Path:
    source = save_llama(tmp_path / "source", llama(dtype=dtype, tied=tied))
    samples = [torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(1))]
    vlaquant.quantize(source, {"rules": list(rules)}, samples=samples, output=tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_real_consumer_computes_the_same(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    packed = write_llama(tmp_path, {"part": "language", **SCHEMES[scheme]}, dtype=dtype)
    ours = vlaquant.load(packed)
    loaded: Any = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype, output_loading_info=True)
    theirs, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # compressed-tensors simulates dynamic int8 activations with absmax / 127.5; kernels and vlaquant divide by 127
    with torch.inference_mode(), kernel_range() if scheme == "w8a8" else nullcontext():
        mine, other = ours(TOKENS).logits.float(), theirs.eval()(TOKENS).logits.float()
    limit = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    assert float((mine - other).norm() / other.norm()) < limit


@pytest.mark.usefixtures("unverified")
def test_mixed_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    packed = write_llama(
        tmp_path, {"pattern": "*.mlp.*", "scheme": "w4a16", "group_size": 64}, {"part": "language", "scheme": "w8a8"}
    )
    assert read_config(packed)["quantization_config"]["format"] == "mixed-precision"
    ours = vlaquant.load(packed)
    theirs: Any = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        mine, other = ours(TOKENS).logits.float(), theirs(TOKENS).logits.float()
    assert float((mine - other).norm() / other.norm()) < 3e-2


@pytest.mark.usefixtures("unverified")
def test_loaded_layers_are_packed_and_equal(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", llama())
    result = vlaquant.quantize(
        source, {"rules": [{"part": "language", **SCHEMES["w4 group"]}]}, output=tmp_path / "packed"
    )
    loaded = vlaquant.load(tmp_path / "packed")
    assert quantized_layers(loaded) == quantized_layers(result.model) != {}
    for name, tensor in file_tensors(result.model).items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    float_weights = [m for n, m in loaded.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert float_weights == []


@pytest.mark.usefixtures("interpreter")
def test_openvla_is_verified_in_a_fresh_process(tmp_path: Path) -> None:
    source = save_openvla(tmp_path / "source", openvla(dtype=torch.bfloat16))
    recipe = {"rules": [{"part": "language", **SCHEMES["w4 group"]}, {"part": "vision", "scheme": "w8a8"}]}
    result = vlaquant.quantize(source, recipe, samples=observations(10), output=tmp_path / "packed")
    assert result.manifest["verification"]["output"] == "equal bit for bit"
    packed = tmp_path / "packed"
    assert (packed / "dataset_statistics.json").read_bytes() == (source / "dataset_statistics.json").read_bytes()
    assert read_config(packed)["norm_stats"] == read_config(source)["norm_stats"]
    loaded = vlaquant.load(packed)
    assert isinstance(loaded, OpenVLAForActionPrediction)
    image = observations(1)[0].image
    quantized: Any = result.model
    assert (loaded.predict_action(image, "push") == quantized.predict_action(image, "push")).all()


def test_a_file_that_differs_is_noticed_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip_one_code(sources: Any, directory: Path, **more: Any) -> None:
        join_tensor_files(sources, directory, **more)
        file = directory / "model.safetensors"
        written = load_file(file)
        written["model.layers.0.mlp.up_proj.weight_packed"][0, 0] ^= 1
        save_file(written, file, metadata={"format": "pt"})

    monkeypatch.setattr("vlaquant.export.writing.join_tensor_files", flip_one_code)
    with pytest.raises(ExportError, match=r"1 tensors differ.*up_proj\.weight_packed"):
        write_llama(tmp_path, {"part": "language", **SCHEMES["w4 group"]})
    assert not (tmp_path / "packed").exists()


@pytest.mark.usefixtures("unverified")
def test_a_policy_from_memory_brings_its_processor(tmp_path: Path) -> None:
    policy = openvla()
    image = observations(1)[0].image
    vlaquant.quantize(policy, {"rules": [{"part": "language", "scheme": "w8a8"}]}, output=tmp_path / "packed")
    loaded: Any = vlaquant.load(tmp_path / "packed")
    assert (loaded.predict_action(image, "push") == policy.predict_action(image, "push")).all()
    side = read_manifest(tmp_path / "packed")["side_files_sha256"]
    assert {"tokenizer.json", "processor_config.json"} <= side.keys()


def answers_of(model: nn.Module, output: torch.Tensor) -> Callable[..., None]:
    """What the fresh process leaves behind when all tensors are right."""

    def run(directory: Path, inputs_file: Path, report_file: Path, family: Family) -> None:
        digests = {name: digest(tensor) for name, tensor in file_tensors(model).items()}
        write_json(report_file.with_suffix(".json"), digests)
        save_file({"output": output}, report_file)

    return run


def test_an_output_that_differs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    inputs = {"input_ids": TOKENS}
    with torch.inference_mode():
        right = model(**inputs).logits
    monkeypatch.setattr("vlaquant.export.verify._run_fresh", answers_of(model, right))
    assert verify(model, tmp_path, FAMILIES["hf"], inputs)["output_values"] == right.numel()
    monkeypatch.setattr("vlaquant.export.verify._run_fresh", answers_of(model, right + 0.25))
    with pytest.raises(ExportError, match=r"all tensors are equal, but the output differs by 0\.25"):
        verify(model, tmp_path, FAMILIES["hf"], inputs)


@pytest.mark.usefixtures("interpreter")
def test_a_directory_that_does_not_load_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho it broke >&2\nexit 3\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ExportError, match="a fresh process could not load and run it: it broke"):
        verify(llama(), tmp_path, FAMILIES["hf"], {"input_ids": TOKENS})


def test_unknown_models_are_compared_tensor_by_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    recipe = {"rules": [{"part": "model", "scheme": "w8a8"}]}
    result = vlaquant.quantize(net, recipe, output=tmp_path / "packed")
    assert result.manifest["verification"]["tensors"] == len(net.state_dict())
    fresh = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    loaded = vlaquant.load(tmp_path / "packed", model=fresh)
    x = torch.randn(3, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), net(x))
    with pytest.raises(CheckpointError, match="pass it"):
        vlaquant.load(tmp_path / "packed")
    other = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    with pytest.raises(CheckpointError, match=r"0: the checkpoint holds a packed layer \(32, 64\)"):
        vlaquant.load(tmp_path / "packed", model=other)


@pytest.mark.usefixtures("unverified")
def test_tied_weights_are_written_once_and_tied_again(tmp_path: Path) -> None:
    packed = write_llama(tmp_path, {"part": "language", **SCHEMES["w4 group"]}, tied=True)
    assert "lm_head.weight" not in load_file(packed / "model.safetensors")
    loaded: Any = vlaquant.load(packed)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.usefixtures("unverified")
def test_the_loader_refuses_what_does_not_fit(tmp_path: Path) -> None:
    packed = write_llama(tmp_path, {"part": "language", **SCHEMES["w4 group"]})
    file = packed / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lacks tensors.*model\.norm\.weight"):
        vlaquant.load(packed)
    save_file(tensors | {"model.norm.weight": norm, "stray": norm.clone()}, file)
    with pytest.raises(CheckpointError, match="has not: stray"):
        vlaquant.load(packed)
    write_json(packed / MANIFEST, read_manifest(packed) | {"complete": False})
    with pytest.raises(CheckpointError, match="cut off"):
        vlaquant.load(packed)


def test_config_round_trip() -> None:
    model = llama()
    vlaquant.quantize(
        model, {"rules": [{"pattern": "*.0.mlp.*", "scheme": "w8a8"}, {"part": "language", **SCHEMES["w3 group"]}]}
    )
    layers = quantized_layers(model)
    found = from_quantization_config(to_quantization_config(model), list(dict(model.named_modules())))
    assert found.keys() == layers.keys()
    for name, scheme in layers.items():
        assert (found[name].weight, found[name].activation) == (scheme.weight, scheme.activation)


def test_patterns_match_just_the_names() -> None:
    everything = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in ("q", "k")] + [
        "model.layers.1.q.extra",
        "xmodel.layers.1.q",
    ]
    alike = {name for name in everything if name.endswith(".q") and name.startswith("model")}
    assert target_patterns(alike, everything) == [r"re:^model\.layers\.\d+\.q$"]
    some = {"model.layers.1.q", "model.layers.11.q"}
    patterns = target_patterns(some, everything)
    hit = {name for name in everything if any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns)}
    assert hit == some


def test_ignore_is_empty_and_targets_are_anchored() -> None:
    model = llama()
    vlaquant.quantize(model, {"rules": [{"part": "language", "scheme": "w8a8"}]})
    config = to_quantization_config(model)
    assert config["ignore"] == []
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert all(target.startswith("re:^") and target.endswith("$") for target in targets)
    assert format_of(next(iter(quantized_layers(model).values()))) == "int-quantized"
