"""Tiny directories of every family, quantized by every scheme: for a test, and for the table of all families."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_groot
import tiny_hf
import torch
from tiny import llama, observations, openvla, save_llama, save_openvla
from tiny_oft import oft_observations, save_oft
from tiny_pi0 import pi0, robot_observations, save_pi0
from torch import Tensor, nn

import vlaquant
from vlaquant.families import Family, family_of_config
from vlaquant.plan import Plan

SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16 AWQ + GPTQ": {
        "rule": {"scheme": "w4a16", "group_size": 32},
        "transforms": [{"kind": "awq", "grid": 5}],
        "quantizer": {"kind": "gptq"},
    },
    "W8A8 SmoothQuant": {"rule": {"scheme": "w8a8"}, "transforms": [{"kind": "smoothquant"}]},
}


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model with random weights.

    Attributes:
        save: writes its directory; puts on the path what loading it imports.
        samples: what it is calibrated with.
        parts: that are quantized.
    """

    save: Callable[[Path, pytest.MonkeyPatch], Path]
    samples: Callable[[], Sequence[Any]]
    parts: tuple[str, ...]


def _windows() -> list[Tensor]:
    return [torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def _save_groot(directory: Path, patch: pytest.MonkeyPatch) -> Path:
    tiny_groot.install_package(directory.parent / f"{directory.name} package", patch)
    return tiny_groot.save_groot(directory, tiny_groot.groot())


def _save_lookalike(kind: str, directory: Path, patch: pytest.MonkeyPatch) -> Path:
    del patch
    written: Path = _lookalikes().save(directory, kind)
    return written


def _save_hf(kind: str, directory: Path, patch: pytest.MonkeyPatch) -> Path:
    del patch
    return tiny_hf.save(directory, kind)


def _lookalikes() -> Any:
    """Imported late, as it puts a package on the path that stands for LeRobot."""
    return importlib.import_module("tiny_lookalikes")


_SEEING = ("vision", "projector", "language")
#: Family, and which of its models -> how to make one.
TINY: dict[str, Tiny] = {
    "openvla: OpenVLA": Tiny(
        lambda directory, _: save_openvla(directory, openvla(parallel=False)), partial(observations, 8), _SEEING
    ),
    "openvla: OpenVLA-OFT": Tiny(
        lambda directory, _: save_oft(directory), partial(oft_observations, 8), (*_SEEING, "action")
    ),
    "pi0: π0": Tiny(
        lambda directory, _: save_pi0(directory, pi0()), robot_observations, (*_SEEING, "expert", "action")
    ),
    "lerobot: SmolVLA look-alike": Tiny(
        partial(_save_lookalike, "smolvla"), lambda: _lookalikes().observations(4), (*_SEEING, "expert", "action")
    ),
    "lerobot: π0.5 look-alike": Tiny(
        partial(_save_lookalike, "pi05"), lambda: _lookalikes().observations(4), (*_SEEING, "expert", "action")
    ),
    "groot: GR00T N1.7 look-alike": Tiny(
        _save_groot, partial(tiny_groot.batches, 6), ("vision", "language", "fusion", "expert")
    ),
    "hf: llama": Tiny(lambda directory, _: save_llama(directory, llama()), _windows, ("language", "head")),
    **{
        f"hf: {kind}": Tiny(partial(_save_hf, kind), partial(observations, 8), _SEEING)
        for kind in ("llava", "paligemma", "qwen2_5_vl", "qwen3_vl", "idefics3")
    },
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model.

    Attributes:
        plan: with the dead layers that the probe found.
        verified: what the other process said about the output.
        same: whether the loaded directory acts as the model that was quantized in memory, bit for bit.
        error: of the output (logits, or what the expert predicts) as a share of the float one.
    """

    plan: Plan
    verified: str
    same: bool
    error: float


def family_of(directory: Path) -> Family:
    return family_of_config(json.loads((directory / "config.json").read_text(encoding="utf-8")))


def recipe_for(name: str, scheme: str) -> dict[str, Any]:
    chosen = dict(SCHEMES[scheme])
    rule = chosen.pop("rule")
    return chosen | {
        "rules": [{"part": part, **rule} for part in TINY[name].parts],
        "on_indivisible": "channel",
    }


@torch.inference_mode()
def answers(family: Family, model: nn.Module, sample: Any) -> tuple[Tensor, Tensor]:
    """What ``run`` gives, and the action; of what does not act, the same again."""
    inputs = family.inputs(model, sample)
    output = family.run(model, inputs)
    return output, output if family.act is None else family.act(model, inputs)


def quantized(name: str, scheme: str, directory: Path, output: Path) -> Outcome:
    """Quantize the directory on the disk and the model in memory, and compare what they do on a sample."""
    family, samples, recipe = family_of(directory), TINY[name].samples(), recipe_for(name, scheme)
    written = vlaquant.quantize(directory, recipe, samples=samples, output=output)
    in_memory = vlaquant.quantize(family.load(directory), recipe, samples=samples)
    (wanted, _), mine, loaded = (
        answers(family, model, samples[0]) for model in (family.load(directory), in_memory.model, vlaquant.load(output))
    )
    return Outcome(
        plan=written.plan,
        verified=str((written.manifest or {})["verification"]["output"]),
        same=all(torch.equal(one, other) for one, other in zip(mine, loaded, strict=True)),
        error=float((loaded[0] - wanted).norm() / wanted.norm()),
    )
