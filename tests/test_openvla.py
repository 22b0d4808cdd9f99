"""How the OpenVLA class behaves: caching, batches, gradients, copies, parallel decoding and clear errors."""

import copy

import numpy as np
import pytest
import torch
from oracles_openvla import EMPTY_TOKEN, inputs, record, reference_model
from tiny import ACTION, openvla

from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
TOWER = {"width": 8, "depth": 2, "heads": 2, "mlp": 8, "patch": 7}


@pytest.fixture(scope="module")
def loaded() -> OpenVLAForActionPrediction:
    return reference_model("fused")


@pytest.fixture
def model(loaded):
    """The original's weights; a copy, for tests that change them."""
    return copy.deepcopy(loaded)


def single(row: int) -> dict[str, torch.Tensor]:
    """One prompt of the padded batch, without its padding."""
    length = int(inputs("fused")["attention_mask"][row].sum())
    return {
        key: value[row : row + 1] if key == "pixel_values" else value[row : row + 1, :length]
        for key, value in inputs("fused").items()
    }


def test_cache_changes_nothing(model):
    prefix, pixels = single(0)["input_ids"], single(0)["pixel_values"]
    with torch.no_grad():
        step = model(prefix, pixel_values=pixels, use_cache=True)
        for _ in range(6):
            token = step.logits[:, -1:].argmax(dim=-1)
            prefix = torch.cat([prefix, token], dim=1)
            step = model(token, past_key_values=step.past_key_values, use_cache=True)
            full = model(prefix, pixel_values=pixels, use_cache=False)
            torch.testing.assert_close(step.logits[:, -1], full.logits[:, -1], rtol=0, atol=1e-4)
            assert torch.equal(step.logits[:, -1].argmax(), full.logits[:, -1].argmax())
    assert torch.equal(model.predict_tokens(**_prompt(0), count=6), prefix[0, -6:])


def _prompt(row: int) -> dict[str, torch.Tensor]:
    return {key: single(row)[key] for key in ("input_ids", "pixel_values")}


def test_generate_takes_a_mask_and_batches_of_one_length(model):
    ids = torch.cat([single(0)["input_ids"], single(0)["input_ids"].flip(1)])
    pixels = inputs("fused")["pixel_values"]
    both = model.generate(
        ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=4, do_sample=False
    )
    for row in range(2):
        alone = model.predict_tokens(ids[row : row + 1], pixels[row : row + 1], count=4)
        assert torch.equal(both[row, ids.shape[1] :], alone)


def test_generate_refuses_padded_prompts(model):
    batch = {key: value for key, value in inputs("fused").items() if key != "labels"}
    with pytest.raises(CalibrationError, match="padded"):
        model.generate(**batch, max_new_tokens=2, do_sample=False)


def test_a_padded_batch_equals_its_samples(model):
    with torch.no_grad():
        batch = model(**inputs("fused"))
        alone = [model(**single(row)) for row in range(2)]
    for row, output in enumerate(alone):
        length = output.logits.shape[1]
        torch.testing.assert_close(batch.logits[row, :length], output.logits[0], rtol=0, atol=1e-4)
    counts = [int((single(row)["labels"][:, 1:] != -100).sum()) for row in range(2)]
    mean = sum(float(output.loss) * count for output, count in zip(alone, counts, strict=True)) / sum(counts)
    assert float(batch.loss) == pytest.approx(mean, abs=1e-5)


def test_gradients_reach_all_that_acts(model):
    model.train()
    model(**inputs("fused")).loss.backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    dead = ("blocks.2.", "featurizer.norm.", "attn_pool.")
    assert silent == {name for name, _ in model.named_parameters() if any(part in name for part in dead)}
    assert all(float(p.grad.abs().max()) > 0.0 for p in model.parameters() if p.grad is not None)


def test_a_copy_is_independent(loaded):
    copied = copy.deepcopy(loaded)
    with torch.no_grad():
        before = loaded(**inputs("fused")).logits
        for parameter in copied.vision_backbone.parameters():
            parameter.zero_()
        assert torch.equal(loaded(**inputs("fused")).logits, before)
        assert not torch.allclose(copied(**inputs("fused")).logits, before)


def test_a_seeing_policy_passes(model):
    assert model.check_sight(**_prompt(0)) > 1.0


def test_a_blind_policy_is_refused(model):
    with torch.no_grad():
        model.projector.fc3.weight.zero_()
    with pytest.raises(CalibrationError, match="image does not reach the action"):
        model.check_sight(**_prompt(0))


def test_nan_logits_are_refused(model):
    with torch.no_grad():
        model.projector.fc3.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN"):
        model.check_sight(**_prompt(0))


def test_empty_token_is_appended_only_where_missing(model):
    assert model.encode(IMAGE, "open drawer")[0][0, -2:].tolist() == [5, EMPTY_TOKEN]
    model.config.empty_token_id = record()["vocabulary"].index(":")  # every prompt ends so
    assert model.encode(IMAGE, "open drawer")[0][0, -2:].tolist() == [8, 5]


def test_missing_pieces_are_named(model):
    with pytest.raises(CheckpointError, match="pixel_values"):
        model(single(0)["input_ids"])
    with pytest.raises(CheckpointError, match=r"shape \[1, 3, 28, 28\], wanted \[b, 6, 28, 28\]"):
        model(single(0)["input_ids"], pixel_values=torch.zeros(1, 3, 28, 28))
    with pytest.raises(CheckpointError, match="bridge_orig, no_mask"):
        model.predict_action(IMAGE, "open drawer", "libero")
    with pytest.raises(CheckpointError, match="unnorm_key"):
        model.predict_action(IMAGE, "open drawer")
    model.processor = None
    with pytest.raises(CheckpointError, match="no processor"):
        model.predict_action(IMAGE, "open drawer", "bridge_orig")


def test_parallel_decoding_reads_one_pass():
    model = openvla()
    input_ids, pixel_values = model.encode(IMAGE, "push")
    queries = torch.tensor([model.config.action_query_token_ids])
    with torch.no_grad():
        logits = model(torch.cat([input_ids, queries], dim=1), pixel_values=pixel_values).logits
    tokens = model.predict_tokens(input_ids, pixel_values, count=2 * ACTION)
    assert torch.equal(tokens, logits[0, -2 * ACTION :].argmax(dim=-1))
    action = model.predict_action(IMAGE, "push")
    assert action.shape == (2, ACTION)
    assert np.array_equal(action.ravel(), model.action_tokens.decode(tokens.numpy()))  # q01 = -1 and q99 = 1


def test_parallel_decoding_wants_a_query_for_each_token():
    model = openvla()
    model.config.action_query_token_ids = model.config.action_query_token_ids[:-1]
    with pytest.raises(CheckpointError, match="lists 7 `action_query_token_ids` but the action has 8 tokens"):
        model.predict_action(IMAGE, "push")


def test_autoregressive_chunks():
    model = openvla(parallel=False)
    assert model.predict_action(IMAGE, "push").shape == (ACTION,)
    model.config.action_chunk = 3
    assert model.predict_action(IMAGE, "push").shape == (3, ACTION)


@pytest.mark.parametrize(("decoding", "shift"), [("autoregressive", 1), ("parallel", 0)])
def test_loss_is_that_of_the_right_position(model, decoding, shift):
    model.config.action_decoding = decoding
    batch = single(0)
    with torch.no_grad():
        output = model(**batch)
    labels = batch["labels"][0]
    places = [index for index in range(len(labels)) if labels[index] != -100]
    scores = output.logits[0].log_softmax(dim=-1)
    wanted = -sum(scores[model.image_tokens + place - shift, labels[place]] for place in places) / len(places)
    assert float(output.loss) == pytest.approx(float(wanted), abs=1e-5)


def test_chosen_dtype_is_kept_through_the_pass():
    model = openvla(dtype=torch.bfloat16)
    input_ids, pixel_values = model.encode(IMAGE, "push")
    assert pixel_values.dtype == torch.float32
    assert model(input_ids, pixel_values=pixel_values).logits.dtype == torch.bfloat16


def test_new_weights_are_not_degenerate():
    model = openvla()
    state = model.state_dict()
    assert all(float(state[name].std()) > 0.0 for name in state if name.endswith(("pos_embed", "_token")))
    scales = [state[name] for name in state if name.endswith("scale_factor")]
    assert len(scales) == 6
    assert all(torch.equal(scale, torch.full_like(scale, 0.5)) for scale in scales)
    assert model.check_sight(*model.encode(IMAGE, "push")) > 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timm_model_ids": ["vit_giant_patch14_clip_224"]}, "vit_giant_patch14_clip_224.*known: vit_small"),
        ({}, "neither `timm_model_ids` nor `vision_towers`"),
        ({"vision_towers": [TOWER | {"colour": 1}]}, r"unknown keys \['colour'\]"),
        ({"vision_towers": [TOWER | {"activation": "relu"}]}, "activation 'relu'; known: gelu, quick_gelu"),
        ({"vision_towers": [TOWER], "timm_override_act_layers": ["silu"]}, "activation 'silu'"),
        ({"vision_towers": [TOWER, TOWER]}, "2 vision towers, 1 `image_sizes`"),
        ({"vision_towers": [TOWER] * 3, "image_sizes": [28] * 3}, "3 vision towers"),
        ({"vision_towers": [TOWER], "timm_override_act_layers": [None, None]}, "2 `timm_override_act_layers`"),
    ],
)
def test_a_wrong_tower_is_refused(fields, message):
    config = OpenVLAConfig(**fields)
    with pytest.raises(CheckpointError, match=message):
        _ = config.towers


def test_unknown_decoding_is_refused():
    with pytest.raises(CheckpointError, match="'diffusion'; known: autoregressive, parallel, regression"):
        OpenVLAConfig(action_decoding="diffusion")


def test_config_survives_saving(tmp_path):
    config = openvla().config
    config.save_pretrained(tmp_path)
    again = OpenVLAConfig.from_pretrained(tmp_path)
    assert again.towers == config.towers
    ours = ("norm_stats", "action_chunk", "action_decoding", "action_query_token_ids", "empty_token_id", "image_sizes")
    assert {key: getattr(again, key) for key in ours} == {key: getattr(config, key) for key in ours}
    assert again.text_config.to_dict() == config.text_config.to_dict()
