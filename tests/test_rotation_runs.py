"""Rotated runs: streamed as in memory, stopped and resumed, in several processes, and read by other loaders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import together
from safetensors.torch import save_file
from staged import (
    differing,
    files_of,
    in_memory,
    killed_after,
    make_source,
    recipe_for,
    samples_for,
    skip_verification,
    streamed,
    written,
)
from transformers import AutoModelForCausalLM

import vlaquant

ROTATION = {"kind": "rotation"}
CASES = [
    ("llama", "rtn", "w4a16", []),
    ("llama", "gptq", "w8a8", []),
    ("llama", "gptq", "w4a16", [{"kind": "awq", "grid": 4}]),
    ("llama tied", "gptq", "w4a16", []),
    ("llama tied", "rtn", "w8a8 static", [{"kind": "smoothquant"}]),
    ("openvla", "gptq", "w4a16", []),
]


def rotated_recipe(kind: str, quantizer: str, scheme: str, scalings: list[dict[str, Any]]) -> dict[str, Any]:
    return recipe_for(kind, quantizer, scheme, transforms=[ROTATION, *scalings])


def run_case(source: Path, case: tuple[Any, ...], output: Path, **more: Any) -> None:
    samples = None if case[1] == "rtn" and not case[3] else samples_for(case[0])
    with pytest.MonkeyPatch.context() as patched:
        skip_verification(patched)
        streamed(source, rotated_recipe(*case), samples, output, **more)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_streamed_resumed_and_in_memory_are_the_same(case: tuple[Any, ...], tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", case[0])
    run_case(source, case, tmp_path / "whole")
    with killed_after(1):
        run_case(source, case, tmp_path / "stopped")
    run_case(source, case, tmp_path / "stopped", resume=True)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    samples = None if case[1] == "rtn" and not case[3] else samples_for(case[0])
    assert differing(in_memory(source, rotated_recipe(*case), samples), written(tmp_path / "whole")) == []
    plain = recipe_for(case[0], case[1], case[2], transforms=case[3])
    assert differing(in_memory(source, plain, samples), written(tmp_path / "whole")) != []


def test_what_stays_float_is_rotated_too(tmp_path: Path) -> None:
    """A block without a rule, and an embedding in 8 bits."""
    source = make_source(tmp_path / "source", "llama tied")
    recipe = {
        "rules": [
            {"pattern": "model.layers.1.*", "scheme": "w4a16", "group_size": 32},
            {"pattern": "model.embed_tokens", "scheme": "w8a16", "modules": "embedding"},
        ],
        "transforms": [ROTATION],
    }
    streamed(source, recipe, None, tmp_path / "out")
    found = written(tmp_path / "out")
    assert differing(in_memory(source, recipe, None), found) == []
    before = written(source)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(before[name], found[name])
    torch.testing.assert_close(before[name].norm(dim=0), found[name].norm(dim=0))


@pytest.mark.parametrize("kind", ["llama", "llama tied"])
def test_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", kind)
    recipe = {"rules": [{"part": "language", "scheme": "w8a16"}], "transforms": [ROTATION]}
    result = streamed(source, recipe, None, tmp_path / "out")
    assert result.manifest["verification"]["output"].startswith("equal")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    tokens = samples_for(kind)[0]
    with torch.inference_mode():
        ours = vlaquant.load(tmp_path / "out")(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()(tokens).logits
        float_ = vlaquant.load(source)(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert float((ours - float_).norm() / float_.norm()) < 0.02, "8 bits a row are near the float model"


def test_a_loaded_model_that_is_tied_can_be_filled(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama tied")
    recipe = {"rules": [{"part": "language", "scheme": "w8a16"}], "transforms": [ROTATION]}
    streamed(source, recipe, None, tmp_path / "out")
    tokens = samples_for("llama tied")[0]
    with torch.inference_mode():
        wanted = vlaquant.load(tmp_path / "out")(tokens).logits
        assert torch.equal(vlaquant.load(tmp_path / "out", model=vlaquant.load(source))(tokens).logits, wanted)


def test_a_file_that_names_only_the_head(tmp_path: Path) -> None:
    """Some checkpoints store a tied pair as ``lm_head.weight``."""
    source = make_source(tmp_path / "source", "llama tied")
    run_case(source, CASES[3], tmp_path / "usual")
    tensors = written(source)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    run_case(source, CASES[3], tmp_path / "other")
    assert differing(written(tmp_path / "usual"), written(tmp_path / "other")) == []


def run_all(source: Path, output: Path) -> None:
    for number, case in enumerate(CASES[:3]):
        run_case(source, case, output / str(number))


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    ended = together(tmp_path / "log", 2, run_all, source, tmp_path / "two")
    assert [one.code for one in ended] == [0, 0], "\n".join(one.err for one in ended)
    run_all(source, tmp_path / "one")
    for number in range(3):
        assert files_of(tmp_path / "two" / str(number)) == files_of(tmp_path / "one" / str(number))


def test_both_modes_write_the_same(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "llama")
    run_case(source, CASES[1], tmp_path / "replay")
    run_case(source, CASES[1], tmp_path / "rerun", mode="rerun")
    assert differing(written(tmp_path / "replay"), written(tmp_path / "rerun")) == []
