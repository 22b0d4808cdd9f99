"""Names on the disk and names in the model: transformers' own map, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pi0 import hub_tensors, pi0, save_pi0, without_dtype
from transformers import MixtralConfig, MixtralForCausalLM

import vlaquant
from vlaquant.checkpoint import TensorFiles
from vlaquant.engine.opening import open_model
from vlaquant.errors import CheckpointError
from vlaquant.families.pi0 import PI0
from vlaquant.families.renaming import live_names
from vlaquant.recipe import load_recipe

_RECIPE = load_recipe({"rules": [{"part": "language", "scheme": "w8a16"}], "quantizer": {"kind": "rtn"}})


def _change(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a directory, or take them out (None); ``__`` stands for a dot."""
    file = directory / "model.safetensors"
    changed: dict[str, Any] = load_file(file) | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in changed.items() if value is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", ["saved", "hub", "live"])
def test_every_set_of_names_is_streamed(tmp_path: Path, names: str, dtype: torch.dtype) -> None:
    model = pi0(dtype=dtype)
    # A config without a dtype must not turn the model into float32
    directory = without_dtype(save_pi0(tmp_path / names, model, names))
    on_disk = set(load_file(directory / "model.safetensors"))
    assert (on_disk == set(model.state_dict())) == (names == "live")
    opened = open_model(directory, _RECIPE, stream=True)
    assert opened.files is not None, opened.note
    assert set(opened.files) == set(model.state_dict())
    loaded = vlaquant.load(directory).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.files.read(name), tensor), name
        assert torch.equal(loaded[name], tensor), name
        assert opened.model.state_dict()[name].dtype == dtype
    opened.files.close()


def test_one_tensor_under_two_names_counts_once_and_must_be_the_same(tmp_path: Path) -> None:
    directory = save_pi0(tmp_path / "hub", pi0(), "hub")
    head = "model.paligemma_with_expert.paligemma.lm_head.weight"
    tensors = load_file(directory / "model.safetensors")
    with TensorFiles.open([directory / "model.safetensors"]) as files:
        renamed = live_names(PI0.build(directory), files.names())
        assert renamed[head] == "model.vlm.language_model.embed_tokens.weight"
        files.rename_(renamed)
        assert len(files) == len(tensors) - 1
    changed = tensors[head].clone()
    changed[-1, -1] += 1
    _change(directory, **{head: changed})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and .*embed_tokens\.weight are both .* differ"):
        open_model(directory, _RECIPE, stream=True)


def test_tensors_that_transformers_computes_are_no_renamed_ones(tmp_path: Path) -> None:
    """Mixtral's experts lie one by one on the disk, and in one tensor in the model."""
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model: Any = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    names = list(load_file(tmp_path / "model.safetensors"))
    renamed = live_names(model, names)
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == 6
    assert len({renamed[name] for name in experts}) == 6
    assert not {renamed[name] for name in experts} & set(model.state_dict())
    assert {renamed.get(name, name) for name in names if name not in experts} <= set(model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_out_proj__weight": None}, r"lacks tensors that the model needs: action_out_proj\.weight"),
        ({"action_out_proj__weight": torch.zeros(3, 64)}, r"other shapes than the model's: \('action_out_proj\.weight"),
        ({"nobody__knows": torch.zeros(3)}, r"holds tensors that the model has not: nobody\.knows"),
    ],
)
def test_transformers_would_go_on_with_random_values(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    directory = save_pi0(tmp_path / "broken", pi0(), "live")
    _change(directory, **change)
    with pytest.raises(CheckpointError, match=message):
        vlaquant.load(directory)


def test_hub_names_of_the_fixture_are_none_of_the_model() -> None:
    """The oracle of the tests above: written by hand from published checkpoints."""
    model = pi0()
    tensors = hub_tensors(model)
    assert not set(tensors) & set(model.state_dict())
    assert len(tensors) == len(model.state_dict()) + 1
    assert "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm.bias" in tensors


def test_a_config_of_another_dtype_than_the_files_is_not_streamed(tmp_path: Path) -> None:
    """transformers casts what it loads; tensors that are copied as they are would not fit the others."""
    directory = save_pi0(tmp_path / "cast", pi0(), "live")
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    path.write_text(json.dumps(config), encoding="utf-8")
    opened = open_model(directory, _RECIPE, stream=True)
    assert opened.files is None
    assert "torch.float32 in the files, torch.bfloat16 wanted" in opened.note
