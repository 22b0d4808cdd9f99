"""LeRobot's own classes: quantized, written, loaded in a fresh process, and never loaded by LeRobot as if nothing were.

Needs LeRobot: ``make test-lerobot``. SmolVLA runs as it is; of π0 and π0.5 only the sizes are changed.
"""

import copy
import logging
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

if not any(distributions(name="lerobot")):  # tests/lookalikes has a package of that name, too
    pytest.skip("LeRobot is not installed: `make lerobot`", allow_module_level=True)

import lerobot_page
from tiny_lerobot_policies import ACTION, CHUNK, observations, save, tiny_pi

import vlaquant
from vlaquant.families import FAMILIES, find_folds
from vlaquant.families.lerobot import LEROBOT
from vlaquant.families.lerobot.running import act
from vlaquant.linear import W4A16Linear, W8A8Linear
from vlaquant.passes.fold import apply_fold_, channels_of

pytestmark = [
    pytest.mark.lerobot,
    pytest.mark.filterwarnings("default"),  # of LeRobot and of what it is installed with
]
KINDS = ["smolvla", "pi0", "pi05"]
#: For :func:`change`; random weights are far harder to round than trained ones, and give 0.5 to 1.7 if they are others
LIMITS = {"w4a16": 0.35, "w8a8": 0.06}
_PARTS = ("vision", "projector", "language", "expert")
RECIPES: dict[str, dict[str, Any]] = {
    "w4a16": {
        "rules": [{"part": part, "scheme": "w4a16", "group_size": 32} for part in _PARTS],
        "on_indivisible": "channel",
        "transforms": [{"kind": "awq", "grid": 6}],
        "quantizer": {"kind": "gptq"},
    },
    "w8a8": {
        "rules": [{"part": part, "scheme": "w8a8"} for part in _PARTS],
        "transforms": [{"kind": "smoothquant"}],
    },
}


def recipe(kind: str, name: str) -> dict[str, Any]:
    return RECIPES[name] | {"family": "lerobot" if kind == "smolvla" else "tiny_lerobot"}


def stock(kind: str) -> Any:
    from lerobot.policies.factory import get_policy_class

    return get_policy_class(kind)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("source") / kind, kind)


@pytest.fixture(scope="module", params=list(RECIPES))
def made(request: pytest.FixtureRequest, kind: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("output") / request.param
    samples = [*observations(3), *observations(1, seed=1, wrist=False)]
    return vlaquant.quantize(source, recipe(kind, request.param), samples, output=output)


def loaded(source: Path, kind: str) -> Any:
    return FAMILIES[recipe(kind, "w8a8")["family"]].load(source)


def acted(policy: Any) -> torch.Tensor:
    return act(policy, LEROBOT.inputs(policy, observations(1, 3)[0]))


def change(policy: Any, before: Any) -> float:
    """How far the way from the noise to the action is from that of another policy, as a share of its length."""
    inputs = LEROBOT.inputs(before, observations(1, 3)[0])
    noise = inputs["noise"]
    ways = [one.predict_action_chunk(dict(inputs), noise=noise) - noise[:, :, :4] for one in (policy, before)]
    return float((ways[0] - ways[1]).norm() / ways[1].norm())


def cast_to_bfloat16_(policy: Any) -> None:
    """π as LeRobot does it, which leaves norms and what sees alone; SmolVLA's decoders."""
    if policy.config.type != "smolvla":
        policy.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
        return
    for name, module in policy.named_modules():
        if name.endswith(("text_model", "lm_expert")):
            module.to(torch.bfloat16)


def test_our_loader_gives_the_policy_of_theirs(kind, source):
    ours = loaded(source, kind)
    with tiny_pi():
        theirs = stock(kind).from_pretrained(source)
    assert type(ours) is type(theirs)
    mine, its = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == its.keys()
    assert {name: tensor.dtype for name, tensor in mine.items()} == {name: tensor.dtype for name, tensor in its.items()}
    assert [name for name in mine if not torch.equal(mine[name], its[name])] == []
    inputs = LEROBOT.inputs(ours, observations(1)[0])
    assert torch.equal(LEROBOT.run(ours, inputs), LEROBOT.run(theirs, inputs))


def test_a_policy_is_built_without_a_hub(kind, source):
    policy = FAMILIES[recipe(kind, "w8a8")["family"]].build(source)
    assert all(parameter.is_meta for parameter in policy.parameters())
    assert not any(buffer.is_meta for buffer in policy.buffers())


def test_only_what_changes_no_action_is_called_dead(kind, source):
    policy = loaded(source, kind)
    inputs = LEROBOT.inputs(policy, observations(1)[0])
    dead, before = LEROBOT.dead(policy), LEROBOT.run(policy, inputs)
    for name, module in policy.named_modules():
        if type(module) is torch.nn.Linear:
            module.weight.data.neg_()
            assert torch.equal(LEROBOT.run(policy, inputs), before) == (name in dead), name
            module.weight.data.neg_()


def test_folds_keep_the_function(kind, source):
    policy = loaded(source, kind)
    inputs = LEROBOT.inputs(policy, observations(1)[0])
    before, groups = LEROBOT.run(policy, inputs), find_folds(policy, LEROBOT.folds)
    for group in groups:
        apply_fold_(policy, group, 2 ** torch.empty(channels_of(policy, group)).uniform_(-2.0, 2.0), {})
    torch.testing.assert_close(LEROBOT.run(policy, inputs), before, rtol=1e-4, atol=1e-4)
    assert len(groups) == {"smolvla": 30, "pi0": 24, "pi05": 24}[kind]
    assert sum(bool(group.chunks) for group in groups) == (6 if kind == "pi05" else 0)


def test_masks_are_those_of_the_policy(kind, source):
    policy = loaded(source, kind)
    inputs = LEROBOT.inputs(policy, observations(1, wrist=False)[0])
    seen: list[torch.Tensor] = []
    embed = policy.model.embed_prefix

    def watched(*args: Any, **more: Any) -> Any:
        embedded = embed(*args, **more)
        seen.append(embedded[1])
        return embedded

    policy.model.embed_prefix = watched
    act(policy, inputs)
    masks = LEROBOT.token_masks(policy, inputs)
    assert torch.equal(masks["language"], seen[0])
    assert masks["vision"].tolist() == [True] + [False] * (len(masks["vision"]) - 1)


def test_quantized_and_close(kind, source, made):
    assert made.manifest["verification"]["output"] == "equal bit for bit"
    policy: Any = vlaquant.load(made.output)
    before = loaded(source, kind)
    assert type(policy) is type(before)
    kept = {layer.name for layer in made.plan.layers if layer.scheme is None}
    assert all(name.endswith(".dense") or LEROBOT.part_of(name) in {"action", "head"} for name in kept)
    assert change(policy, before) < LIMITS[made.output.name]
    inputs = LEROBOT.inputs(policy, observations(1)[0])
    chunk = policy.predict_action_chunk(dict(inputs), noise=inputs["noise"])
    assert chunk.shape == (1, 8, 4)
    torch.manual_seed(1)
    assert policy.select_action(dict(inputs)).shape == (1, 4)
    stats = [path for path in source.iterdir() if path.name.startswith("policy_")]
    assert len(stats) == 4
    assert all((made.output / path.name).read_bytes() == path.read_bytes() for path in stats)


def test_lerobot_refuses_a_quantized_directory(kind, source, made):
    """Where LeRobot's own loader, given what we wrote under the usual names, returns random weights."""
    from lerobot.configs.policies import PreTrainedConfig

    for loader in (stock(kind), PreTrainedConfig):  # 0.6.1 says that the name is not registered, 0.6.0 has no class
        with pytest.raises(Exception, match=rf"'vlaquant_{kind}'.* (is not registered|in <class )"):
            loader.from_pretrained(made.output)
    if kind == "smolvla":  # with a config of the caller's own; those of π0 and π0.5 swallow this error, too
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
            stock(kind).from_pretrained(made.output, config=PreTrainedConfig.from_pretrained(source))


def test_marks_are_needed(kind, source, made, tmp_path, caplog):
    """LeRobot's loaders take the same weights under the usual names without an error."""
    for path in source.iterdir():
        if path.is_file() and path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(load_file(made.output / "model-00001-of-00001.safetensors"), tmp_path / "model.safetensors")
    before = loaded(source, kind)
    with tiny_pi(), caplog.at_level(logging.CRITICAL):
        wrong = stock(kind).from_pretrained(tmp_path)
    assert change(wrong, before) > 2 * change(vlaquant.load(made.output), before)


def test_what_users_do_with_a_policy(kind, source, made):
    policy: Any = vlaquant.load(made.output)
    wanted = acted(policy)
    assert torch.equal(acted(copy.deepcopy(policy)), wanted)
    other: Any = vlaquant.load(made.output)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(policy.state_dict())
    assert torch.equal(acted(other), wanted)
    before = loaded(source, kind)
    for one in (policy, before):
        cast_to_bfloat16_(one)
    packed = [module for module in policy.modules() if isinstance(module, W4A16Linear | W8A8Linear)]
    assert torch.bfloat16 in {module.weight.dtype for module in packed}
    assert change(policy, before) < LIMITS[made.output.name]


def test_compiled(made):
    policy: Any = vlaquant.load(made.output)
    inputs = LEROBOT.inputs(policy, observations(1, 3)[0])
    wanted = policy.predict_action_chunk(dict(inputs), noise=inputs["noise"])
    policy.model.sample_actions = torch.compile(policy.model.sample_actions, backend="eager")
    torch.testing.assert_close(policy.predict_action_chunk(dict(inputs), noise=inputs["noise"]), wanted)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_bfloat16_policies(kind, tmp_path):
    source = save(tmp_path / "half", kind, dtype="bfloat16")
    policy = loaded(source, kind)
    dtypes = {
        LEROBOT.part_of(name): module.weight.dtype
        for name, module in policy.named_modules()
        if type(module) is torch.nn.Linear and "norm" not in name
    }
    assert dtypes["vision"] == dtypes["projector"] == dtypes["action"] == torch.float32
    assert dtypes["language"] == dtypes["expert"] == torch.bfloat16
    result = vlaquant.quantize(source, recipe(kind, "w4a16"), observations(3), output=tmp_path / "out")
    assert result.manifest["verification"]["output"] == "equal bit for bit"
    after = vlaquant.load(tmp_path / "out")
    assert change(after, policy) < LIMITS["w4a16"]


def test_the_code_of_the_page(tmp_path, monkeypatch):
    """All of it, LeRobot's own loop included."""
    save(tmp_path / "my_policy", "smolvla", empty_cameras=2)
    lerobot_page.prepare(tmp_path, observations(4))
    monkeypatch.chdir(tmp_path)
    left = lerobot_page.run(3, observations(1, seed=3)[0])
    policy, processors = left["policy"], left["policy"].processors
    assert type(policy) is stock("smolvla")
    assert left["chunk"].shape == (1, CHUNK, ACTION)
    assert left["action"].shape == (1, ACTION)
    overrides = {
        "tokenizer_processor": {"tokenizer_name": "my_policy_w4/tokenizer"},
        "device_processor": {"device": "cpu"},
    }
    from lerobot.policies.factory import make_pre_post_processors

    before, after = make_pre_post_processors(
        policy.config, pretrained_path="my_policy_w4", preprocessor_overrides=overrides
    )
    policy.reset()
    torch.manual_seed(0)
    ours = processors.after(policy.select_action(processors.before(dict(left["frame"]))))
    for pipelines in ((before, after), left["pipelines"]):
        policy.reset()
        torch.manual_seed(0)
        loop = [left["seen"], policy, torch.device("cpu"), *pipelines]
        torch.testing.assert_close(left["predict_action"](*loop, use_amp=False, task="push the robot"), ours)
