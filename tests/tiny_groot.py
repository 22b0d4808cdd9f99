"""A tiny look-alike of GR00T N1.7, its directory, and batches as its collator would make them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lookalikes.groot import Gr00tN1d7, Gr00tN1d7Config
from torch import Tensor

ROBOTS, STATE, ACTION, CHUNK = 3, 8, 8, 4
IMAGE, START, END = 90, 91, 92
_SIDE_FILES = {
    "statistics.json": {"gr1": {"state": [0.5]}},
    "embodiment_id.json": {"gr1": 1},
    "processor_config.json": {},
}

#: What Isaac-GR00T's package is to vlaquant: a module that makes the classes known to transformers.
_PACKAGE = "gr00t/model/gr00t_n1d7/gr00t_n1d7.py"


def config() -> Gr00tN1d7Config:
    """Width 64 in the backbone and 128 in the action head; two layers of the language model are cut off."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    backbone: dict[str, Any] = {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
    return Gr00tN1d7Config(
        backbone_config=backbone | tokens | {"video_token_id": 93},
        select_layer=2,
        max_state_dim=STATE,
        max_action_dim=ACTION,
        action_horizon=CHUNK,
        hidden_size=96,
        input_embedding_dim=128,
        max_seq_len=16,
        dit_layers=3,
        dit_heads=2,
        vl_layers=1,
        vl_heads=2,
        max_num_embodiments=ROBOTS,
    )


def groot(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Gr00tN1d7:
    torch.manual_seed(seed)
    model: Any = Gr00tN1d7(config())
    for name, parameter in model.named_parameters():
        if name.endswith((".norm1.linear.weight", "proj_out_1.weight")):
            torch.nn.init.normal_(parameter, std=0.05)
    return model.to(dtype).eval()


def batches(count: int = 4, *, robot: int = 1, shown: bool = True) -> list[dict[str, Tensor]]:
    """One picture of 4 × 4 patches, some words, the last of them padding, and the action to learn."""
    made = []
    for index in range(count):
        draw = torch.Generator().manual_seed(index)
        ids = torch.tensor([[START, IMAGE, IMAGE, IMAGE, IMAGE, END, *torch.randint(0, 90, (5,), generator=draw), 0]])
        batch = {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < ids.shape[1] - 1).long().unsqueeze(0),
            "pixel_values": torch.randn((16, 3 * 2 * 4 * 4), generator=draw),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "state": torch.randn((1, 1, STATE), generator=draw),
            "embodiment_id": torch.tensor([robot]),
        }
        if shown:
            shape = (1, CHUNK, ACTION)
            batch |= {"action": torch.randn(shape, generator=draw), "action_mask": torch.ones(shape)}
        made.append(batch)
    return made


def save_groot(directory: Path, model: Gr00tN1d7) -> Path:
    """The policy as a checkpoint directory with its side files."""
    model.save_pretrained(directory)
    for name, content in _SIDE_FILES.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


def install_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``import gr00t…`` find the look-alike, in this process and in fresh ones."""
    module = folder / _PACKAGE
    module.parent.mkdir(parents=True)
    module.write_text("from lookalikes.groot import Gr00tN1d7, Gr00tN1d7Config\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
