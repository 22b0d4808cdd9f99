"""Plain causal language models of transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlaquant.errors import CalibrationError
from vlaquant.families.base import Family, Inputs, empty_weights, llama_folds, nothing_dead, nothing_to_check


def text_samples(directory: Path, text_file: Path, count: int, length: int) -> list[Tensor]:
    """``count`` windows of ``length`` tokens [1, length], evenly spread over a text file.

    Raises:
        CalibrationError: no such file, or too short for one window.
    """
    if not text_file.is_file():
        raise CalibrationError(f"{text_file}: no such text file")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ids = torch.tensor(tokenizer(text_file.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    if len(ids) < length:
        raise CalibrationError(f"{text_file}: holds {len(ids)} tokens, fewer than sequence_length={length}")
    starts = torch.linspace(0, len(ids) - length, min(count, len(ids) // length)).long()
    return [ids[start : start + length].unsqueeze(0) for start in starts.tolist()]


def _load(directory: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
    return model.eval()


def _build(directory: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with empty_weights(config.dtype):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # parameters that moved to the meta device came apart
    empty: nn.Module = model.eval()
    return empty


def _owns_config(config: dict[str, Any]) -> bool:
    architectures: list[str] = config.get("architectures") or []
    return config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and any(
        name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures
    )


def _inputs(model: nn.Module, sample: Tensor) -> Inputs:
    return {"input_ids": sample.to(next(model.parameters()).device)}


def _run(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits [1, t, vocabulary]."""
    logits: Tensor = model(input_ids=inputs["input_ids"], use_cache=False).logits
    return logits


def _example(model: Any) -> Inputs:
    ids = torch.randint(0, model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    return _inputs(model, ids)


CAUSAL_LM = Family(
    name="causal_lm",
    parts=(
        ("language", r"model\.layers\..*|transformer\.h\..*"),
        ("head", r"lm_head"),
    ),
    folds=llama_folds(r"model\.layers\.\d+"),
    owns=lambda model: type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")),
    owns_config=_owns_config,
    load=_load,
    build=_build,
    dead=nothing_dead,
    inputs=_inputs,
    run=_run,
    example=_example,
    check=nothing_to_check,
)
