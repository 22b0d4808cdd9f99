"""A rotated model is the same model; planted defects are seen, and what cannot be rotated is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from tiny import llama, openvla
from tiny_oft import save_oft
from tiny_pi0 import pi0
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import vlaquant
from vlaquant.calibrate.units import find_units
from vlaquant.engine import rotating
from vlaquant.engine.opening import Opened
from vlaquant.engine.rotating import plan_for, rotate_
from vlaquant.errors import PlanError, RecipeError
from vlaquant.families import Family, family_of_model
from vlaquant.passes import hadamard, rotation
from vlaquant.recipe import Recipe, load_recipe

EXACT = 1e-10


class Norm(nn.Module):
    """RMSNorm that computes in the dtype of its input; transformers' own always round to float32."""

    def __init__(self, weight: Tensor, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.weight + self.offset)


def recipe(**section: Any) -> Recipe:
    return load_recipe(
        {"rules": [{"part": "language", "scheme": "w8a8"}], "transforms": [{"kind": "rotation", **section}]}
    )


def wide(model: Any) -> Any:
    """In float64 throughout, with gains and biases that are not trivial."""
    offset = 1.0 if "Gemma" in type(model).__name__ else 0.0
    generator = torch.Generator().manual_seed(1)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            gain = torch.rand(module.weight.shape, generator=generator) + 0.5 - offset
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Norm(gain, offset))
        elif getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.1, generator=generator)
    return model.to(torch.float64).eval()


def biased_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        attention_bias=True,
        mlp_bias=True,
    )
    return LlamaForCausalLM(config)


def gemma(kind: Any = GemmaForCausalLM, config: Any = GemmaConfig) -> Any:
    torch.manual_seed(0)
    return kind(
        config(
            vocab_size=128,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=24,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama tied": lambda: llama(tied=True),
    "llama of no Hadamard width": lambda: llama(hidden=40),
    "llama with biases": biased_llama,
    "gemma": gemma,
    "openvla": openvla,
}


def output(model: nn.Module) -> Tensor:
    family = family_of_model(model)
    with torch.inference_mode():
        inputs = {
            name: tensor.to(torch.float64) if tensor.is_floating_point() and model.dtype == torch.float64 else tensor
            for name, tensor in family.example(model).items()
        }
        return family.run(model, inputs)


def opened(model: nn.Module, family: Family | None = None) -> Opened:
    return Opened(model, family or family_of_model(model), None, None, "in memory")


def rotated(model: nn.Module, section: Recipe, family: Family | None = None) -> Opened:
    return rotate_(opened(model, family), section, find_units(model), torch.device("cpu"))


def changed(before: Tensor, after: Tensor) -> float:
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("section", [{}, {"values": False}, {"residual": False}], ids=["both", "residual", "values"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_function_stays(kind: str, section: dict[str, Any]) -> None:
    model = wide(MODELS[kind]())
    before, weights = output(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotated(model, recipe(**section))
    assert changed(before, output(model)) < EXACT
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], weights[name])}
    if section.get("residual", True):
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in moved} >= {
            "embed_tokens",
            "down_proj",
            "lm_head",
        }
        gains = [m.weight + m.offset for m in model.modules() if isinstance(m, Norm)]
        assert all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)
    else:
        assert {name.split(".")[-2] for name in moved} == {"v_proj", "o_proj"}


def test_channels_that_stand_out_do_no_longer() -> None:
    """What it is for: embedding columns of very different size come to nearly the same size."""
    model = wide(llama())
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 100.0

    def worst(weight: Tensor) -> float:
        return float(weight.detach().abs().max() / weight.detach().square().mean().sqrt())

    before = worst(model.model.embed_tokens.weight)
    rotated(model, recipe())
    assert worst(model.model.embed_tokens.weight) < before / 4


def without_gain(weight: Tensor, turn: hadamard.Rotation, gain: Tensor | None = None) -> Tensor:
    return hadamard.turned_columns(weight, turn)


def wrong_side(weight: Tensor, turn: hadamard.Rotation) -> Tensor:
    return hadamard.turned_columns(weight, turn) if weight.shape[0] == weight.shape[1] else weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("defect", ["gain forgotten", "wrong side", "values of v only"])
def test_a_wrong_rotation_is_seen(defect: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(llama()).to(dtype)
    if defect == "gain forgotten":
        monkeypatch.setattr(rotation, "turned_columns", without_gain)
    elif defect == "wrong side":
        monkeypatch.setattr(rotation, "turned_rows", wrong_side)
    else:

        def one_side(*args: Any) -> dict[str, rotation.Turned]:
            return {
                name: one for name, one in rotation.turned_tensors(*args).items() if not name.endswith("o_proj.weight")
            }

        monkeypatch.setattr(rotating, "turned_tensors", one_side)
    with pytest.raises(PlanError, match="changed the output"):
        rotated(model, recipe(residual=defect != "values of v only"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forgotten", ["{block}.self_attn.o_proj", "{block}.mlp.down_proj"])
def test_a_forgotten_writer_is_seen(forgotten: str, dtype: torch.dtype) -> None:
    model = wide(llama()).to(dtype)
    family = family_of_model(model)
    assert family.stream is not None
    writes = tuple(name for name in family.stream.writes if name != forgotten)
    lacking = replace(family, stream=replace(family.stream, writes=writes))
    with pytest.raises(PlanError, match=r"proj\.weight has no place"):
        rotated(model, recipe(), lacking)
    denied = replace(family, stream=replace(family.stream, writes=writes, apart_inside=(forgotten,)))
    with pytest.raises(PlanError, match="changed the output"):
        rotated(model, recipe(), denied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forgotten_projector_is_seen(dtype: torch.dtype) -> None:
    model = wide(openvla()).to(dtype)
    family = family_of_model(model)
    assert family.stream is not None
    apart = (r"vision_backbone\..*", r"projector\..*")
    with pytest.raises(PlanError, match="has no place"):
        rotated(model, recipe(), replace(family, stream=replace(family.stream, inputs=(), apart=apart)))
    wrong = replace(family.stream, inputs=((r"projector\.fc2",),), apart=apart)
    with pytest.raises(PlanError, match="changed the output"):
        rotated(model, recipe(), replace(family, stream=wrong))


@pytest.mark.parametrize("kind", ["llava", "paligemma", "idefics3", "smolvlm"])
def test_image_text_models_stay_the_same(kind: str) -> None:
    model = tiny_hf.make(kind)
    before = output(model)
    rotated(model, recipe())
    assert changed(before, output(model)) < 1e-4


class Adaptive(nn.Module):
    """A norm whose scale another input decides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x


def with_norm(norm: nn.Module) -> Any:
    model: Any = llama()
    model.model.layers[1].input_layernorm = norm
    return model


def with_shared_norm() -> Any:
    model: Any = llama()
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    return model


def with_factor() -> Any:
    model: Any = llama()
    model.model.layers[1].factor = nn.Parameter(torch.ones(64))
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "LayerNorm": (lambda: with_norm(nn.LayerNorm(64)), "LayerNorm, wanted a norm with a gain"),
    "LayerNorm without bias": (lambda: with_norm(nn.LayerNorm(64, bias=False)), "does not turn"),
    "adaptive norm": (lambda: with_norm(Adaptive(64)), "wanted a norm with a gain"),
    "shared norm": (with_shared_norm, "is shared with another module"),
    "unknown parameter": (with_factor, r"layers\.1\.factor has no place"),
    "gemma 2": (lambda: gemma(Gemma2ForCausalLM, Gemma2Config), "wanted|has no place"),
    "qwen2.5-vl": (lambda: tiny_hf.make("qwen2_5_vl"), "has no place"),
    "qwen3-vl": (lambda: tiny_hf.make("qwen3_vl"), "has no place"),
    "pi0": (pi0, "no residual stream that can be rotated"),
    "other": (lambda: nn.Sequential(nn.Linear(4, 4)), "no residual stream that can be rotated"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_rotated_is_refused(kind: str) -> None:
    make, message = REFUSED[kind]
    model = make()
    with pytest.raises(PlanError, match=message):
        rotated(model, recipe())
    with pytest.raises(PlanError, match=message):
        plan_for(model, family_of_model(model), recipe())


def test_heads_that_read_hidden_states_are_refused(tmp_path: Path) -> None:
    model = vlaquant.load(save_oft(tmp_path / "oft"))
    with pytest.raises(PlanError, match=r"(action_head|proprio_projector).* has no place"):
        plan_for(model, family_of_model(model), recipe())


def test_the_plan_tells_of_an_untied_head_and_leaves_the_model_alone() -> None:
    model: Any = llama(tied=True)
    plan = plan_for(model, family_of_model(model), recipe())
    head = next(layer for layer in plan.layers if layer.name == "lm_head")
    assert "a weight of its own" in head.reason
    assert (head.bytes_before, head.bytes_after) == (0, 128 * 64 * 4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    rotated(model, recipe())
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings


def test_values_alone_leave_a_head_tied() -> None:
    model: Any = llama(tied=True)
    section = recipe(residual=False)
    assert all(
        "a weight of its own" not in layer.reason for layer in plan_for(model, family_of_model(model), section).layers
    )
    rotated(model, section)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_recipes_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="turns nothing"):
        recipe(residual=False, values=False)
    rules = [{"part": "language", "scheme": "w8a8"}]
    with pytest.raises(RecipeError, match="put it first"):
        load_recipe({"rules": rules, "transforms": [{"kind": "smoothquant"}, {"kind": "rotation"}]})
