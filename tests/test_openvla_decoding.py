"""The loop over a Llama's blocks has the same bits as transformers', also copied, compiled, and asked several times."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from oracles_openvla import reference_model
from PIL import Image
from test_openvla_processing import IMAGES, STRATEGIES, image, image_processor
from tiny import openvla, save_openvla, tokenizer
from tiny_oft import images_of, oft_observations, save_oft
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import vlaquant
from vlaquant.errors import CheckpointError
from vlaquant.families.data import load_observations
from vlaquant.models.openvla import decoding, prompt
from vlaquant.models.openvla.processing import PromptCache
from vlaquant.recipe import load_recipe

EXAMPLES = Path(__file__).parent.parent / "examples"
INSTRUCTIONS = ["push", "take the robot", "what action should the robot take ?"]
DTYPES = [torch.float32, torch.bfloat16]


def frames(count: int = 6) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 40, 48, 3), dtype=np.uint8))


def chunked(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """12 tokens an action, one after another; ``changes`` are of the language model's configuration."""
    model: Any = openvla(parallel=False, dtype=dtype)
    model.config.action_chunk = 3
    if changes:
        torch.manual_seed(1)
        config: Any = LlamaConfig(**(model.config.text_config.to_dict() | {"initializer_range": 0.2} | changes))
        model.language_model = LlamaForCausalLM._from_config(config).to(dtype).eval()
        for name, bias in model.language_model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(bias, std=0.1)
    return model


@torch.no_grad()
def by_transformers(model: Any, input_ids: Tensor, pixel_values: Tensor, count: int) -> Tensor:
    """Greedy decoding through the forward of transformers and its growing cache: the oracle."""
    tokens = []
    step = model(input_ids, pixel_values=pixel_values, use_cache=True)
    for _ in range(count):
        tokens.append(step.logits[:, -1:].argmax(dim=-1))
        step = model(tokens[-1], past_key_values=step.past_key_values, use_cache=True)
    return torch.cat(tokens, dim=1)[0]


def asked(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image with another instruction than the one before."""
    for index, frame in enumerate(frames()):
        yield model.encode(frame, INSTRUCTIONS[index % len(INSTRUCTIONS)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
    ],
    ids=["plain", "grouped queries", "biases and scaled positions"],
)
def test_tokens_are_those_of_transformers(dtype, changes):
    model = chunked(dtype, **changes)
    assert decoding.is_plain(model.language_model)
    seen = set()
    for input_ids, pixel_values in asked(model):
        tokens = model.predict_tokens(input_ids, pixel_values, count=12)
        assert torch.equal(tokens, by_transformers(model, input_ids, pixel_values, 12))
        seen |= set(tokens.tolist())
    assert len(seen) > 4  # not one token over and over


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_hidden_states_are_equal_bit_for_bit(dtype):
    model = chunked(dtype)
    inner = model.language_model.model
    x = torch.randn(1, 19, 64, dtype=dtype)
    assert torch.equal(decoding.hidden_states(model.language_model, x), inner(inputs_embeds=x).last_hidden_state)
    mask = torch.zeros(1, 1, 19, 19, dtype=dtype)
    everything = decoding.hidden_states(model.language_model, x, mask)
    assert torch.equal(everything, inner(inputs_embeds=x, attention_mask=mask).last_hidden_state)
    assert not torch.equal(everything, decoding.hidden_states(model.language_model, x))


@pytest.mark.parametrize("change", ["wrong sign", "wrong place", "late"])
def test_a_broken_loop_is_noticed(change, monkeypatch):
    rotate, attention = decoding._rotate, decoding._attention
    if change == "wrong sign":
        monkeypatch.setattr(decoding, "_rotate", lambda x, cos, sin: rotate(x, cos, -sin))
    elif change == "wrong place":
        monkeypatch.setattr(decoding, "_rotate", lambda x, cos, sin: x)
    else:  # the token that was just made does not see itself

        def blind(q, k, v, *rest, **kwargs):
            cut = k.shape[2] - (q.shape[2] == 1)
            return attention(q, k[:, :, :cut], v[:, :, :cut], *rest, **kwargs)

        monkeypatch.setattr(decoding, "_attention", blind)
    model = chunked()
    answers = [
        torch.equal(model.predict_tokens(*both, count=12), by_transformers(model, *both, 12)) for both in asked(model)
    ]
    assert not all(answers)


@pytest.mark.parametrize("case", ["eager", "hook", "forward", "another class", "training", "dynamic"])
def test_what_the_loop_does_not_know_goes_through_transformers(case):
    model = chunked()
    fired = []
    if case == "eager":
        model = chunked(attn_implementation="eager")
        model.language_model.set_attn_implementation("eager")
    elif case == "hook":
        model.language_model.model.layers[1].register_forward_hook(lambda *_: fired.append(1))
    elif case == "forward":  # as calibration follows blocks, and accelerate moves them
        block = model.language_model.model.layers[1]
        forward = block.forward

        def followed(*args, **kwargs):
            fired.append(1)
            return forward(*args, **kwargs)

        block.forward = followed
    elif case == "another class":
        config = MistralConfig(**(model.config.text_config.to_dict() | {"model_type": "mistral", "sliding_window": 5}))
        model.language_model = MistralForCausalLM(config).eval()
    elif case == "training":
        model.train()
    else:
        model = chunked(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    assert not decoding.is_plain(model.language_model)
    for input_ids, pixel_values in asked(model):
        tokens = model.predict_tokens(input_ids, pixel_values, count=12)
        before = len(fired)
        assert torch.equal(tokens, by_transformers(model, input_ids, pixel_values, 12))
    assert (before > 0) == (case in {"hook", "forward"})
    with pytest.raises(CheckpointError, match="without hooks"):
        model.compile_decoding_("eager")


@torch.inference_mode()
def assert_likeliest(model: Any, input_ids: Tensor, pixel_values: Tensor, tokens: Tensor) -> None:
    """After those before it each token has the largest logit, give or take some rounding of the dtype.

    Compiled steps round elsewhere, and random weights make ties, which fall one way or the other on different CPUs.
    """
    ids = torch.cat([input_ids, tokens[None, :-1]], dim=1)
    logits = model(ids, pixel_values=pixel_values, use_cache=False).logits[0, -len(tokens) :]
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    slack = 16 * torch.finfo(logits.dtype).eps * logits.abs().amax()
    assert (logits.amax(dim=1) - chosen <= slack).all()


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_policies_too(scheme, dtype, tmp_path):
    rule = {"scheme": scheme} | ({"group_size": 32} if scheme == "w4a16" else {})
    recipe = load_recipe(
        {
            "family": "openvla",
            "rules": [
                {"part": "language", **rule},
                {"part": "vision", **rule},
                {"part": "projector", **rule},
                {"part": "action", "scheme": "float"},
            ],
            "quantizer": {"kind": "rtn"},
        }
    )
    model: Any = vlaquant.quantize(save_openvla(tmp_path, chunked(dtype)), recipe).model
    model.processor = chunked().processor
    torch.compiler.reset()
    compiled = copy.deepcopy(model)
    compiled.compile_decoding_("eager")
    for input_ids, pixel_values in asked(model):
        wanted = by_transformers(model, input_ids, pixel_values, 12)
        assert torch.equal(model.predict_tokens(input_ids, pixel_values, count=12), wanted)
        assert_likeliest(model, input_ids, pixel_values, compiled.predict_tokens(input_ids, pixel_values, count=12))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_the_demo_policy_acts_as_through_transformers(dtype):
    policy: Any = vlaquant.load(EXAMPLES / "demo_policy").to(dtype)
    queries = torch.tensor([policy.config.action_query_token_ids])
    for seen in load_observations(EXAMPLES / "demo_episodes", "evaluation")[::30]:
        input_ids, pixel_values = policy.encode(seen.image, seen.instruction)
        logits = policy(torch.cat([input_ids, queries], dim=1), pixel_values=pixel_values, use_cache=False).logits
        tokens = policy.predict_tokens(input_ids, pixel_values, count=16)
        assert torch.equal(tokens, logits[0, -16:].argmax(dim=-1))


def test_a_regressed_action_is_that_of_transformers(tmp_path, monkeypatch):
    model: Any = vlaquant.load(save_oft(tmp_path))
    seen = oft_observations()
    actions = [model.predict_action(images_of(one), one.instruction, state=one.state) for one in seen]
    monkeypatch.setattr(decoding, "is_plain", lambda _: False)
    for one, action in zip(seen, actions, strict=True):
        assert np.array_equal(action, model.predict_action(images_of(one), one.instruction, state=one.state))


def test_two_actions_at_a_time_do_not_mix():
    model = chunked()
    questions = list(asked(model)) * 4
    wanted = [model.predict_tokens(*both, count=12) for both in questions]
    compiled = copy.deepcopy(model)
    compiled.compile_decoding_("eager")
    for one in (model, compiled):
        one.predict_tokens(*questions[0], count=12)
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda both, one=one: one.predict_tokens(*both, count=12), questions)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_steps_give_the_same_tokens(backend, dtype):
    torch.compiler.reset()
    model = chunked(dtype, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    compiled = copy.deepcopy(model)
    compiled.compile_decoding_(backend)
    questions = list(asked(model))
    longer = torch.cat([questions[0][0][:, :1], questions[0][0].repeat(1, 12)], dim=1)  # needs a larger cache
    for input_ids, pixel_values in [*questions, (longer, questions[0][1])]:
        tokens = compiled.predict_tokens(input_ids, pixel_values, count=12)
        assert_likeliest(model, input_ids, pixel_values, tokens)
        assert torch.equal(compiled.predict_tokens(input_ids, pixel_values, count=1), tokens[:1])
        if dtype == torch.float32:
            assert torch.equal(tokens, model.predict_tokens(input_ids, pixel_values, count=12))
    with pytest.raises(AssertionError):  # the check sees a wrong token
        assert_likeliest(model, input_ids, pixel_values, tokens.roll(1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself, while it compiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inductor_gives_the_same_tokens(dtype):
    torch.compiler.reset()
    model = chunked(dtype)
    compiled = copy.deepcopy(model)
    compiled.compile_decoding_()
    for input_ids, pixel_values in asked(model):
        wanted = model.predict_tokens(input_ids, pixel_values, count=12)
        assert torch.equal(compiled.predict_tokens(input_ids, pixel_values, count=12), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiles", [False, True], ids=["plain", "CUDA graphs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_on_a_gpu(dtype, compiles):
    torch.compiler.reset()
    model = chunked(dtype).cuda()
    wanted = [by_transformers(model, *both, 12) for both in asked(model)]
    if compiles:
        model.compile_decoding_()
    for both, tokens in zip(asked(model), wanted, strict=True):
        assert torch.equal(model.predict_tokens(*both, count=12), tokens)


def test_what_an_earlier_action_left_is_not_seen():
    torch.compiler.reset()
    model = chunked()
    compiled = copy.deepcopy(model)
    compiled.compile_decoding_("eager")
    (input_ids, pixel_values), *_ = asked(model)
    compiled.predict_tokens(input_ids, torch.full_like(pixel_values, float("nan")), count=12)
    wanted = model.predict_tokens(input_ids, pixel_values, count=12)
    assert torch.equal(compiled.predict_tokens(input_ids, pixel_values, count=12), wanted)


def test_a_compiled_policy_is_copied_moved_and_saved_like_any_other(tmp_path):
    torch.compiler.reset()
    model = chunked()
    names = set(model.state_dict())
    wanted = [model.predict_tokens(*both, count=12) for both in asked(model)]
    model.compile_decoding_("eager")
    for one in (model, copy.deepcopy(model)):
        assert all(torch.equal(one.predict_tokens(*b, count=12), w) for b, w in zip(asked(one), wanted, strict=True))
        assert set(one.state_dict()) == names
    model.to(torch.bfloat16)
    plain = chunked(torch.bfloat16)
    for both in asked(plain):
        assert torch.equal(model.predict_tokens(*both, count=12), plain.predict_tokens(*both, count=12))
    assert vlaquant.load(save_openvla(tmp_path, model))._compiled_step is None


def test_only_autoregressive_policies_have_a_step_to_compile():
    with pytest.raises(CheckpointError, match="'parallel': this policy has no step"):
        openvla().compile_decoding_()


def test_prompts_are_tokenized_once_and_a_bounded_number_is_kept():
    words = tokenizer()
    calls = []

    class Counting:
        def __call__(self, text):
            calls.append(text)
            return words(text)

        def __len__(self):
            return len(words)

    cache, counting = PromptCache(), cast("Any", Counting())
    for _ in range(3):
        for instruction in INSTRUCTIONS:
            assert cache.tokens(counting, instruction) == words(prompt(instruction))["input_ids"]
    assert len(calls) == len(INSTRUCTIONS)
    for number in range(100):
        cache.tokens(counting, f"push {number}")
    assert len(cache._tokens) == PromptCache.SIZE
    before = len(calls)
    cache.tokens(counting, "push")  # forgotten by now
    assert len(calls) == before + 1


def test_another_tokenizer_is_asked_again():
    model: Any = reference_model("fused")
    before = model.encode(frames()[0], "open drawer")[0]
    model.processor.tokenizer.add_tokens(["drawer?"])
    grown = model.encode(frames()[0], "open drawer")[0]
    assert torch.equal(
        grown[0],
        torch.tensor([*model.processor.tokenizer(prompt("open drawer"))["input_ids"], 4]),
    )
    assert not torch.equal(before, grown)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_keep_every_bit(strategy, name):
    """Against the plain way: one tower after another, rows and columns first."""
    made = image_processor(strategy)
    picture = Image.fromarray(image(name))
    towers = []
    for tower, applied in enumerate(made.tvf_normalize_params):
        resized = made._resize(picture, made.input_sizes[tower][-1], Image.Resampling.BICUBIC)
        mean, std = (np.asarray(applied[key], dtype=np.float32) for key in ("mean", "std"))
        values = (np.asarray(resized, dtype=np.float32) / np.float32(255.0) - mean) / std
        towers.append(torch.from_numpy(values).permute(2, 0, 1))
    before = np.asarray(picture).copy()
    assert torch.equal(made.preprocess(picture)["pixel_values"], torch.cat(towers).unsqueeze(0))
    assert np.array_equal(np.asarray(picture), before)
