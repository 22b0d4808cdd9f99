"""Look-alikes of LeRobot's policies through the whole of vlaquant, and what users then do with a quantized policy."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lookalikes import observations, save

import vlaquant
from vlaquant.families.lerobot import LEROBOT
from vlaquant.families.lerobot.running import act
from vlaquant.linear import W4A16Linear, W8A8Linear

#: For :func:`change`; random weights are far harder to round than trained ones, and give above 1 if they are others
LIMITS = {"w4a16": 0.5, "w8a8": 0.06}
_PARTS = ("vision", "projector", "language", "expert")
RECIPES: dict[str, dict[str, Any]] = {
    "w4a16": {
        "rules": [{"part": part, "scheme": "w4a16", "group_size": 32} for part in _PARTS],
        "on_indivisible": "channel",
        "transforms": [{"kind": "awq", "grid": 4}],
        "quantizer": {"kind": "gptq"},
    },
    "w8a8": {
        "rules": [{"part": part, "scheme": "w8a8"} for part in _PARTS],
        "transforms": [{"kind": "smoothquant"}],
    },
}
#: The rest takes as long again; the real classes go through all of them, see tests/test_lerobot_real.py
CASES = [
    pytest.param(("smolvla", "w4a16"), id="smolvla-w4a16"),
    pytest.param(("pi05", "w8a8"), id="pi05-w8a8"),
    pytest.param(("smolvla", "w8a8"), id="smolvla-w8a8", marks=pytest.mark.slow),
    pytest.param(("pi05", "w4a16"), id="pi05-w4a16", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    kind, scheme = request.param
    folder = tmp_path_factory.mktemp(f"{kind}_{scheme}")
    samples = [*observations(3), *observations(1, seed=1, wrist=False)]
    result = vlaquant.quantize(save(folder / "in", kind), RECIPES[scheme], samples, output=folder / scheme)
    return folder / "in", folder / scheme, result


def acted(policy: Any, seed: int = 3) -> torch.Tensor:
    return act(policy, LEROBOT.inputs(policy, observations(1, seed)[0]))


def change(policy: Any, before: Any) -> float:
    """How far the way from the noise to the action is from that of another policy, as a share of its length."""
    inputs = LEROBOT.inputs(before, observations(1, 3)[0])
    noise = inputs["noise"]
    ways = [one.predict_action_chunk(dict(inputs), noise=noise) - noise[:, :, :4] for one in (policy, before)]
    return float((ways[0] - ways[1]).norm() / ways[1].norm())


def test_quantized_and_close(made):
    source, output, result = made
    assert result.manifest["verification"]["output"] == "equal bit for bit"
    policy, before = vlaquant.load(output), vlaquant.load(source)
    assert type(policy) is type(before)
    assert {layer.part for layer in result.plan.quantized.values()} == set(_PARTS)
    kept = {layer.name: layer.reason for layer in result.plan.layers if layer.scheme is None}
    assert all(name.rpartition(".")[2] == "dense" or LEROBOT.part_of(name) in {"action", "head"} for name in kept)
    assert change(policy, before) < LIMITS[result.output.name]
    assert not torch.equal(acted(policy), acted(before))
    assert torch.equal(acted(policy), acted(vlaquant.load(output)))


def test_a_robot_can_be_driven(made):
    policy: Any = vlaquant.load(made[1])
    inputs = LEROBOT.inputs(policy, observations(1)[0])
    chunk = policy.predict_action_chunk(dict(inputs), noise=inputs["noise"])
    assert chunk.shape == (1, 8, 4)
    policy.reset()
    steps = [policy.select_action(dict(inputs), noise=inputs["noise"]) for _ in range(8)]
    assert torch.equal(torch.stack(steps, dim=1), chunk)


def test_stock_loaders_find_neither_type_nor_weights(made):
    from lerobot.configs.policies import PreTrainedConfig

    source, output, result = made
    assert PreTrainedConfig.from_pretrained(str(source)).type in str(LEROBOT.load(source).name)
    with pytest.raises(ValueError, match="is not registered"):
        PreTrainedConfig.from_pretrained(str(output))
    assert not (output / "model.safetensors").exists()
    config = json.loads((output / "config.json").read_text())
    assert config["type"] == f"vlaquant_{config['vlaquant']['type']}"
    assert result.manifest["output_sha256"].keys() == {"model-00001-of-00001.safetensors", "config.json"}
    for name in ("policy_preprocessor.json", "policy_postprocessor.json", "stats.safetensors"):
        assert (output / name).read_bytes() == (source / name).read_bytes()


def test_what_users_do_with_a_policy(made):
    policy: Any = vlaquant.load(made[1])
    wanted = acted(policy)
    packed = [module for module in policy.modules() if isinstance(module, W4A16Linear | W8A8Linear)]
    assert {module.weight.dtype for module in packed} == {torch.float32}
    assert torch.equal(acted(copy.deepcopy(policy)), wanted)
    other: Any = vlaquant.load(made[1])
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not torch.equal(acted(other), wanted)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(acted(other), wanted)


def test_bfloat16_after_loading(made):
    """The decoders as LeRobot itself casts them; float32 stays around them."""
    source, output, result = made
    policy, before = vlaquant.load(output), vlaquant.load(source)
    for one in (policy, before):
        for name, module in one.named_modules():
            if name.endswith(("text_model", "language_model", "lm_expert", "gemma_expert")):
                assert module.to(torch.bfloat16) is module
    cast = [module for module in policy.modules() if isinstance(module, W4A16Linear | W8A8Linear)]
    assert torch.bfloat16 in {module.weight.dtype for module in cast}
    assert change(policy, before) < LIMITS[result.output.name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_compiled(made):
    policy: Any = vlaquant.load(made[1])
    inputs = LEROBOT.inputs(policy, observations(1, 3)[0])
    wanted = policy.predict_action_chunk(dict(inputs), noise=inputs["noise"])
    policy.model.sample_actions = torch.compile(policy.model.sample_actions, backend="eager")
    torch.testing.assert_close(policy.predict_action_chunk(dict(inputs), noise=inputs["noise"]), wanted)
