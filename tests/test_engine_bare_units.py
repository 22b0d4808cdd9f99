"""Units that are a single Linear between blocks: their weights come on demand like those of blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from staged import WINDOWS, differing, in_memory, killed_after, skip_verification, streamed, written
from tiny import tokenizer
from transformers import OPTConfig, OPTForCausalLM

from vlaquant.engine.weights import WeightsOnDemand


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An OPT whose embeddings are narrower than its blocks: ``project_in`` and ``project_out`` stand between them."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=128,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    model: Any = OPTForCausalLM(config)
    model.eval().save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("mode", ["replay", "rerun"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
@pytest.mark.parametrize("room", ["for all", "for one"])
def test_bare_linears(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, mode: str, scheme: str, room: str
) -> None:
    skip_verification(monkeypatch)
    if room == "for one":
        init = WeightsOnDemand.__init__
        monkeypatch.setattr(
            WeightsOnDemand, "__init__", lambda self, *args, **more: init(self, *args, **(more | {"budget": 0}))
        )
    recipe = {"rules": [{"pattern": "model.decoder.*", "scheme": scheme}], "quantizer": {"kind": "gptq"}}
    result = streamed(source, recipe, WINDOWS, tmp_path / "out", mode=mode)
    assert result.held is None
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= set(result.plan.quantized)
    assert differing(written(tmp_path / "out"), in_memory(source, recipe, WINDOWS)) == []
    with killed_after(2):
        streamed(source, recipe, WINDOWS, tmp_path / "again", mode=mode)
    streamed(source, recipe, WINDOWS, tmp_path / "again", mode=mode, resume=True)
    assert differing(written(tmp_path / "again"), written(tmp_path / "out")) == []
