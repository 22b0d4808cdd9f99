"""The synthetic checkpoint: shaped like the published one, loadable, reproducible, and written in little memory."""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from make_synthetic_checkpoint import make_config, make_tensor, write_checkpoint, write_episodes
from safetensors.torch import load_file
from torch import nn

import vlaquant
from vlaquant.checkpoint import weight_files, write_json
from vlaquant.cli import main
from vlaquant.families import FAMILIES
from vlaquant.families.data import load_observations
from vlaquant.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction

FAMILY = FAMILIES["openvla"]


def tiny_config(layers: int = 2) -> OpenVLAConfig:
    """An eighth of the widths, shallow towers and a small vocabulary."""
    config = make_config("eighth", layers)
    assert config.vision_towers is not None
    config.vision_towers = [tower | {"depth": 2} for tower in config.vision_towers]
    config.text_config.vocab_size = 1024 + config.pad_to_multiple_of
    config.text_config.pad_token_id = 1024
    config.empty_token_id = 700
    return config


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "model"
    write_checkpoint(tiny_config(), path)
    return path


def test_it_loads_and_sees(directory: Path) -> None:
    model = vlaquant.load(directory)
    assert isinstance(model, OpenVLAForActionPrediction)
    inputs = FAMILY.example(model)
    assert inputs["pixel_values"].shape == (1, 6, 224, 224)
    FAMILY.check(model, inputs)
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    action = model.predict_action(image, "open the window")
    assert action.shape == (7,)
    assert np.isfinite(action).all()
    known, _ = model.encode(image, "open the window")
    assert 0 not in known
    assert known[0, 0] == 1
    assert known[0, -1] == 700


def test_every_tensor_is_there(directory: Path) -> None:
    wanted = FAMILY.build(directory).state_dict()
    found = {name: tensor for path in weight_files(directory) for name, tensor in load_file(path).items()}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (wanted[name].shape, torch.bfloat16)
        assert torch.equal(tensor, make_tensor(name, tuple(tensor.shape), seed=0))


def test_full_size_is_that_of_the_published_model(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", make_config().to_dict())
    model = FAMILY.build(tmp_path)
    linears = {name: tuple(one.weight.shape) for name, one in model.named_modules() if type(one) is nn.Linear}
    shapes = Counter(linears.values())
    assert len(linears) == 437
    assert shapes[4096, 4096] == 32 * 4 + 1
    assert (shapes[11008, 4096], shapes[4096, 11008], shapes[32064, 4096]) == (64, 32, 1)
    assert linears["vision_backbone.fused_featurizer.blocks.26.mlp.fc1"] == (4304, 1152)
    assert linears["vision_backbone.featurizer.blocks.23.attn.qkv"] == (3072, 1024)
    assert linears["projector.fc1"] == (8704, 2176)
    assert 7.54e9 < sum(parameter.numel() for parameter in model.parameters()) < 7.55e9


def test_layers_cuts_the_language_model(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", make_config("7b", layers=3).to_dict())
    model = FAMILY.build(tmp_path)
    assert isinstance(model, OpenVLAForActionPrediction)
    assert len(model.language_model.model.layers) == 3
    assert len(model.vision_backbone.featurizer.blocks) == 24


def test_content_depends_on_name_and_seed_only() -> None:
    name, shape = "language_model.model.layers.0.mlp.up_proj.weight", (300, 1000)
    first = make_tensor(name, shape, seed=0)
    torch.manual_seed(5)
    assert torch.equal(first, make_tensor(name, shape, seed=0))
    assert not torch.equal(first, make_tensor(name, shape, seed=1))
    assert not torch.equal(first, make_tensor(name.replace("0", "1"), shape, seed=0))
    # No piece repeats an earlier one
    assert len(first.view(-1, 1000).unique(dim=0)) == 300


@pytest.mark.parametrize(
    ("name", "shape", "mean", "std"),
    [
        ("projector.fc1.weight", (512, 400), 0.0, 0.05),
        ("vision_backbone.featurizer.patch_embed.proj.weight", (512, 3, 14, 14), 0.0, 1 / math.sqrt(588)),
        ("language_model.model.norm.weight", (10_000,), 1.0, 0.1),
        ("vision_backbone.featurizer.blocks.0.ls1.scale_factor", (10_000,), 1.0, 0.1),
        ("projector.fc1.bias", (10_000,), 0.0, 0.02),
        ("vision_backbone.featurizer.pos_embed", (1, 256, 100), 0.0, 0.02),
    ],
)
def test_scales_are_realistic(name: str, shape: tuple[int, ...], mean: float, std: float) -> None:
    values = make_tensor(name, shape, seed=0).double()
    assert float(values.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(values.numel()) + 1e-3)
    assert float(values.std()) == pytest.approx(std, rel=0.03)


def test_plan_works(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = [{"part": "language", "scheme": "w4a16", "group_size": 32}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"rules": rules}), encoding="utf-8")
    assert main(["plan", "--config", str(tmp_path / "recipe.yaml"), "--model", str(directory)]) == 0
    table = capsys.readouterr().out
    assert "w4a16" in table
    assert "language" in table


def test_episodes_can_be_run(directory: Path, tmp_path: Path) -> None:
    model = vlaquant.load(directory)
    assert isinstance(model, OpenVLAForActionPrediction)
    write_episodes(tiny_config(), tmp_path / "episodes", 3)
    seen = load_observations(tmp_path / "episodes", "calibration")
    assert len({one.image.tobytes() for one in seen}) == len(seen) == 3
    tokens = [FAMILY.inputs(model, one)["input_ids"] for one in seen]
    assert all(bool((one < 1024).all()) and 0 not in one for one in tokens)
    actions = model.action_tokens.decode(tokens[0][0, -6:].numpy())
    assert np.abs(actions).max() < 1.0
    assert FAMILY.run(model, FAMILY.inputs(model, seen[0])).shape[-1] == 1088


_PEAKS = """
import sys, torch
from pathlib import Path
import make_synthetic_checkpoint as script
from test_synthetic_checkpoint import tiny_config
torch.set_num_threads(1)

def peak_mib():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

def write(name, layers):
    script.write_checkpoint(tiny_config(layers), Path(sys.argv[1], name))
    print(peak_mib())

write("few", 2)
write("many", 24)
kept = {}
real = script.make_tensor
script.make_tensor = lambda name, shape, seed: kept.setdefault(name, real(name, shape, seed))
write("hoarded", 24)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory in /proc")
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PEAKS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    few, many, hoarded = map(float, done.stdout.split())
    # 22 layers more have 135 MiB of weights
    assert many - few < 20, done.stdout
    # What the measurement says if the weights are kept
    assert hoarded - many > 100, done.stdout
