"""Our OpenVLA against numbers of the original code; each way to get it wrong must show."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles_openvla import (
    DATA,
    EMPTY_TOKEN,
    NAMES,
    differences,
    expected,
    inputs,
    published_directory,
    record,
    reference_model,
    tensors,
    weights,
)
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from vlaquant.models.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    PrismaticImageProcessor,
    PrismaticProcessor,
    TowerConfig,
)
from vlaquant.models.openvla.configuration import TIMM_TOWERS, tower_from_timm_id
from vlaquant.models.openvla.vision import Attention, LayerScale, Mlp, Projector, VisionBackbone, VisionTower

TIMM = json.loads((DATA / "timm_towers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_the_original_names_and_shapes(name):
    original = {key: value.shape for key, value in weights(name).items()}
    assert {key: value.shape for key, value in reference_model(name).state_dict().items()} == original


@pytest.mark.parametrize("name", NAMES)
def test_features_logits_and_loss_are_the_original_ones(name):
    assert differences(reference_model(name), name) == {}


@pytest.mark.parametrize("name", NAMES)
def test_prompt_image_and_tokens_are_the_original_ones(name):
    model: Any = reference_model(name)
    wanted = expected(name, "tokens")
    input_ids, pixel_values = model.encode(tensors(name)["input.image"].numpy(), record()["instruction"])
    torch.testing.assert_close(pixel_values, inputs(name)["pixel_values"][:1], rtol=0, atol=1e-6)
    length = int(inputs(name)["attention_mask"][0].sum())
    assert input_ids[0].tolist() == [*inputs(name)["input_ids"][0, :length].tolist(), EMPTY_TOKEN]
    assert torch.equal(model.predict_tokens(input_ids, pixel_values, count=len(wanted)), wanted)
    generated = model.generate(input_ids, pixel_values=pixel_values, max_new_tokens=len(wanted), do_sample=False)
    assert torch.equal(generated[0, input_ids.shape[1] :], wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dataset", "key"), [("bridge_orig", "action"), ("no_mask", "action_no_mask")])
def test_actions_are_the_original_ones(name, dataset, key):
    image = tensors(name)["input.image"].numpy()
    action = reference_model(name).predict_action(image, record()["instruction"], dataset)
    np.testing.assert_allclose(action, expected(name, key).numpy(), rtol=0, atol=1e-12)


def _towers(model: OpenVLAForActionPrediction) -> list[VisionTower]:
    return [module for module in model.modules() if isinstance(module, VisionTower)]


def _use_last_block(model, monkeypatch):
    for tower in _towers(model):
        tower.blocks.append(nn.Identity())  # the block left out is now this one


def _use_third_to_last_block(model, monkeypatch):
    for tower in _towers(model):
        del tower.blocks[-1]


def _apply_the_final_norm(model, monkeypatch):
    for tower in _towers(model):
        tower.register_forward_hook(lambda module, _, output: module.norm(output))


def _swap_towers(model, monkeypatch):
    forward = VisionBackbone.forward
    monkeypatch.setattr(VisionBackbone, "forward", lambda self, pixels: forward(self, pixels.roll(3, dims=1)))


def _skip_layer_scale(model, monkeypatch):
    monkeypatch.setattr(LayerScale, "forward", lambda self, x: x)


def _skip_positions(model, monkeypatch):
    for tower in _towers(model):
        nn.init.zeros_(tower.pos_embed)


def _skip_registers(model, monkeypatch):
    for tower in _towers(model):
        tower.prefix_tokens -= 4
        tower.reg_token = None


def _one_head(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads = 1


def _plain_gelu(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, Mlp):
            module.act = nn.GELU()


def _one_activation_less(model, monkeypatch):
    monkeypatch.setattr(Projector, "forward", lambda self, x: self.fc3(self.fc2(nn.functional.gelu(self.fc1(x)))))


def _image_before_the_first_token(model, monkeypatch):
    def reorder(module, args, kwargs):
        embeddings, patches = kwargs["inputs_embeds"], model.image_tokens
        order = [*range(1, patches + 1), 0, *range(patches + 1, embeddings.shape[1])]
        return args, kwargs | {"inputs_embeds": embeddings[:, order]}

    model.language_model.register_forward_pre_hook(reorder, with_kwargs=True)


BREAKS: list[tuple[Callable[..., None], str, str]] = [
    (_use_last_block, "fused", "patches"),
    (_use_last_block, "siglip", "patches"),
    (_use_third_to_last_block, "fused", "patches"),
    (_apply_the_final_norm, "siglip", "patches"),
    (_swap_towers, "fused", "patches"),
    (_skip_layer_scale, "fused", "patches"),
    (_skip_positions, "siglip", "patches"),
    (_skip_registers, "dino_quick_gelu", "patches"),
    (_one_head, "siglip", "patches"),
    (_plain_gelu, "dino_quick_gelu", "patches"),
    (_one_activation_less, "fused", "features"),
    (_image_before_the_first_token, "fused", "logits"),
]


@pytest.mark.parametrize(("damage", "name", "quantity"), BREAKS)
def test_a_wrong_model_differs(damage, name, quantity, monkeypatch):
    model = reference_model(name)
    with torch.no_grad():
        damage(model, monkeypatch)
    assert quantity in differences(model, name)


def test_a_shifted_bin_gives_another_action():
    model = reference_model("fused")
    model.action_tokens.centers = np.roll(model.action_tokens.centers, 1)
    action = model.predict_action(tensors("fused")["input.image"].numpy(), record()["instruction"], "bridge_orig")
    assert np.abs(action - expected("fused", "action").numpy()).max() > 1e-3


@pytest.fixture
def published(tmp_path, monkeypatch):
    def no_question(*_):
        raise AssertionError("loading asked a question")

    monkeypatch.setattr("builtins.input", no_question)
    return published_directory(tmp_path, "fused")


def test_published_directory_loads_without_remote_code(published):
    assert type(AutoConfig.from_pretrained(published)) is OpenVLAConfig
    processor: Any = AutoProcessor.from_pretrained(published)
    assert type(processor) is PrismaticProcessor
    assert type(processor.image_processor) is PrismaticImageProcessor
    assert processor.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(published).get_vocab()
    loaded: Any = AutoModelForImageTextToText.from_pretrained(published, output_loading_info=True)
    model, report = loaded
    assert type(model) is OpenVLAForActionPrediction
    assert not any(report.values()), report
    stored = weights("fused")
    assert all(torch.equal(value, stored[key].bfloat16()) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_published_directory_loads_in_one_dtype_and_acts(published, dtype):
    chosen = {} if dtype is None else {"dtype": dtype}
    model: Any = AutoModelForImageTextToText.from_pretrained(published, **chosen)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.bfloat16}
    assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    model.processor = AutoProcessor.from_pretrained(published)
    image = tensors("fused")["input.image"].numpy()
    action = model.predict_action(image, record()["instruction"], "bridge_orig")
    assert action.shape == (7,)
    assert np.isfinite(action).all()


def test_attention_implementation_reaches_the_language_model(published):
    model: Any = AutoModelForImageTextToText.from_pretrained(
        published, attn_implementation="eager", dtype=torch.float32
    )
    assert model.language_model.config._attn_implementation == "eager"


def test_saved_directory_predicts_the_same(published, tmp_path):
    model: Any = reference_model("fused")
    model.save_pretrained(tmp_path / "again")
    model.processor.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert differences(again, "fused") == {}
    again.processor = AutoProcessor.from_pretrained(tmp_path / "again")
    image, instruction = tensors("fused")["input.image"].numpy(), record()["instruction"]
    for dataset in ("bridge_orig", "no_mask"):
        wanted = model.predict_action(image, instruction, dataset)
        assert np.array_equal(again.predict_action(image, instruction, dataset), wanted)


@pytest.mark.parametrize("timm_id", TIMM)
def test_tower_has_timm_parameters(timm_id):
    timm = TIMM[timm_id]
    sizes = tower_from_timm_id(timm_id)
    with torch.device("meta"):
        tower = VisionTower(sizes, timm["image_size"])
    wanted = dict(timm["rest"])
    for index in range(timm["depth"]):
        wanted |= {f"blocks.{index}.{key}": shape for key, shape in timm["block"].items()}
    assert {key: list(value.shape) for key, value in tower.state_dict().items()} == wanted
    assert (sizes.heads, tower.prefix_tokens) == (timm["heads"], timm["prefix_tokens"])
    assert {module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)} == {timm["norm_eps"]}


def test_every_known_tower_was_compared_with_timm():
    assert {tower_from_timm_id(timm_id) for timm_id in TIMM} == set(TIMM_TOWERS.values())


def test_openvla_7b_from_its_published_fields():
    config = OpenVLAConfig(
        timm_model_ids=["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        timm_override_act_layers=[None, None],
        image_sizes=[224, 224],
        text_config={"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
    )
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    counts = Counter(type(module) for module in model.modules())
    assert (counts[nn.Linear], counts[nn.Conv2d]) == (437, 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_541_237_184
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert state["projector.fc1.weight"] == (8704, 2176)
    assert state["language_model.model.layers.31.mlp.down_proj.weight"] == (4096, 11008)
    assert state["language_model.lm_head.weight"] == (32064, 4096)
    assert (model.image_tokens, config.action_vocab_size) == (256, 32000)
    text = config.text_config
    assert (text.rms_norm_eps, text.max_position_embeddings, text.num_key_value_heads) == (1e-6, 2048, 32)


def test_activation_override_reaches_the_towers():
    tower: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2, "mlp": 8, "patch": 7}
    config = OpenVLAConfig(
        vision_towers=[tower, tower], image_sizes=[28, 28], timm_override_act_layers=[None, "quick_gelu"]
    )
    plain = TowerConfig(**tower)
    assert config.towers == (plain, TowerConfig(**tower, activation="quick_gelu"))
    assert OpenVLAConfig(vision_towers=[tower]).towers == (plain,)
