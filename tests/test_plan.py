"""Every weight has a verdict and a reason, and a recipe that does not fit is refused before any work."""

import re
from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from tiny import llama, openvla
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import vlaquant
from vlaquant.errors import PlanError
from vlaquant.families import FAMILIES
from vlaquant.linear import W4A16Linear, W8A8Linear
from vlaquant.plan import Plan, legal_groups, make_plan, plan_from_dict, with_dead, without
from vlaquant.recipe import load_recipe

W4 = {"part": "language", "scheme": "w4a16", "group_size": 64}


def make(model: nn.Module, *rules: dict[str, object], family: str = "hf", **recipe: object) -> Plan:
    return make_plan(model, FAMILIES[family], load_recipe({"rules": list(rules), **recipe}))


def test_every_weight_is_listed_once() -> None:
    model = openvla()
    made = make(model, W4, family="openvla")
    listed = [f"{layer.name}.weight" for layer in made.layers] + [other.name for other in made.others]
    biases = {f"{layer.name}.bias" for layer in made.layers}
    assert set(listed) == {name for name, _ in model.named_parameters()} - biases
    assert len(listed) == len(set(listed))
    assert made.bytes_before == sum(p.numel() * p.element_size() for p in model.parameters())


def test_every_layer_has_a_reason() -> None:
    made = make(openvla(), W4, {"part": "action", "scheme": "float"}, family="openvla")
    reasons = {layer.name: layer.reason for layer in made.layers}
    assert reasons["language_model.model.layers.0.mlp.up_proj"] == "rule 'language'"
    assert reasons["projector.fc1"] == "no rule matches"
    assert reasons["language_model.lm_head"] == "rule 'action'"
    assert all(reasons.values())


def test_predicted_bytes_are_the_packed_layers_bytes() -> None:
    model = openvla(dtype=torch.bfloat16)
    rules: list[dict[str, object]] = [
        {"scheme": "w4a16", "group_size": 64, "symmetric": False},
        {"scheme": "w3a16", "group_size": "channel"},
        {"scheme": "w8a16", "group_size": "tensor"},
        {"scheme": "w8a8"},
    ]
    for rule in rules:
        made = make(model, {"part": "vision", **rule}, family="openvla")
        for layer in made.quantized.values():
            assert layer.scheme is not None
            kind = W4A16Linear if layer.scheme.activation is None else W8A8Linear
            packed = kind(layer.shape[1], layer.shape[0], layer.scheme, bias=True, dtype=torch.bfloat16)
            assert layer.bytes_after == packed.resident_bytes, (layer, rule)


def test_first_rule_wins() -> None:
    made = make(llama(), {"pattern": "*.0.mlp.up_proj", "scheme": "float"}, W4)
    assert made.quantized.keys().isdisjoint({"model.layers.0.mlp.up_proj"})
    assert "model.layers.1.mlp.up_proj" in made.quantized


def test_a_rule_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"rule 1 \(lanuage\) matches none.*nearest: language"):
        make(llama(), {"part": "lanuage", "scheme": "w8a8"})
    with pytest.raises(PlanError, match=r"matches none.*model\.layers\.\d\.mlp\.up_proj"):
        make(llama(), {"pattern": "model.layers.0.mlp.upproj", "scheme": "w8a8"})


def test_a_rule_that_earlier_rules_shadow() -> None:
    with pytest.raises(PlanError, match=r"rule 2 .* decides nothing: earlier rules take all 14"):
        make(llama(), W4, {"part": "language", "scheme": "w8a8"})


def test_smollm_with_groups_of_128_names_layers_and_legal_sizes() -> None:
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9)
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    with pytest.raises(PlanError) as error:
        make(model, {"part": "language", "scheme": "w4a16"})
    message = str(error.value)
    assert "model.layers.0.self_attn.q_proj: in_features=576 is not a multiple of group_size=128" in message
    assert "legal group sizes here: 16, 32, 48, 64, 96, 144, 192" in message
    assert "down_proj" not in message  # 1536 divides
    assert message.count("\n") + 1 == 2 * 6


@pytest.mark.parametrize(("choice", "name"), [("nearest", "w4a16_g96"), ("channel", "w4a16_channel"), ("keep", None)])
def test_on_indivisible(choice: str, name: str | None) -> None:
    model = nn.Sequential(nn.Linear(576, 8))
    made = make(model, {"part": "model", "scheme": "w4a16"}, family="module", on_indivisible=choice)
    layer = made.layers[0]
    assert (layer.scheme.name if layer.scheme else None) == name
    assert "576 columns do not divide into groups of 128" in layer.reason


def test_legal_groups_divide() -> None:
    assert legal_groups(720) == [16, 48, 80, 144, 240]
    assert legal_groups(7) == []


def test_tied_head_stays_float() -> None:
    made = make(llama(tied=True), {"part": "head", "scheme": "w8a8"}, {"part": "language", "scheme": "w8a8"})
    head = next(layer for layer in made.layers if layer.name == "lm_head")
    assert head.scheme is None
    assert "shared with model.embed_tokens" in head.reason


def test_weights_read_directly_stay_float() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2), "fc": nn.Linear(16, 16)})
    made = make(model, {"part": "model", "scheme": "w8a8"}, family="module")
    verdicts = {layer.name: layer.scheme is not None for layer in made.layers}
    assert verdicts == {"mha.out_proj": False, "fc": True}


def test_unused_layers_are_rounded_without_data_or_kept() -> None:
    made = make(openvla(), {"part": "vision", "scheme": "w4a16", "group_size": 64}, family="openvla")
    dead = {layer.name for layer in made.layers if layer.dead}
    assert "vision_backbone.fused_featurizer.attn_pool.q" in dead
    assert "vision_backbone.featurizer.blocks.2.attn.qkv" in dead
    assert dead <= made.quantized.keys()
    static = make(openvla(), {"part": "vision", "scheme": "w8a8_static"}, family="openvla")
    assert dead.isdisjoint(static.quantized)


def test_after_the_probe() -> None:
    made = make(llama(), W4)
    name = "model.layers.0.mlp.up_proj"
    assert with_dead(made, [name]).quantized[name].dead
    assert name not in without(made, {name: "because"}).quantized
    static = make(llama(), {"part": "language", "scheme": "w8a8_static"})
    assert name not in with_dead(static, [name]).quantized


def test_round_trip_and_table() -> None:
    made = make(openvla(), W4, family="openvla")
    assert plan_from_dict(made.to_dict()) == made
    text = str(made)
    assert "w4a16_g64" in text
    assert "not covered: Conv2d, " in text
    assert "vision_backbone.featurizer.pos_embed" in made.layer_table()


def test_plan_changes_nothing() -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vlaquant.plan(model, {"rules": [W4]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_rule_for_a_part_leaves_what_the_family_keeps_float_and_a_pattern_decides_it() -> None:
    name = "language_model.model.layers.0.self_attn.q_proj"
    family = replace(FAMILIES["openvla"], keep_float=((re.escape(name), "it is dear to me"),))
    by_part = make_plan(openvla(), family, load_recipe({"rules": [W4]}))
    assert name not in by_part.quantized
    assert next(layer.reason for layer in by_part.layers if layer.name == name) == "it is dear to me"
    by_name = {"pattern": name, "scheme": "w4a16", "group_size": 64}
    assert list(make_plan(openvla(), family, load_recipe({"rules": [by_name]})).quantized) == [name]
